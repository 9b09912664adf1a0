"""GGUF files, run by llama.cpp: log-probabilities equal to the model's, for every family and shape that is taken."""

import copy
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from tiny_models import tiny_model
from transformers import PreTrainedModel

from graftlm.errors import UserError
from graftlm.export.checking import check, compared
from graftlm.export.gguf import export_gguf
from graftlm.export.llama_cpp import ask
from graftlm.export.rounding import computing
from graftlm.export.targets import CANDIDATES, TARGETS
from graftlm.pruning.padding import padded
from graftlm.pruning.per_layer_modeling import FAMILIES, output_projections
from graftlm.pruning.surgery import keep_components, prunable_blocks
from graftlm.tiny import build_tiny_tokenizer

TOKENIZER = build_tiny_tokenizer()
IDS = TOKENIZER("Hello wörld 12, and on.")["input_ids"]
GELU = 5e-3  # llama.cpp looks it up in a table of float16


def model_of(family: str, kept: dict[str, int] | None = None, **changes) -> PreTrainedModel:
    """A tiny random model with every kind of weight random, pruned to `kept` components a block."""
    layers = changes.pop("num_hidden_layers", 4 if family == "smollm3" else 2)
    model = tiny_model(family, vocab_size=264, max_position_embeddings=128, num_hidden_layers=layers, **changes)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name:
            mean = 0.0 if family.startswith("gemma") else 1.0
            parameter.data = mean + 0.2 * torch.randn(parameter.shape, generator=generator)
    if kept:
        ids = {}
        for block in prunable_blocks(model):
            if block.name in kept:
                ids[block.name] = torch.randperm(block.components, generator=generator)[: kept[block.name]]
        model = keep_components(model, ids)
    return model.eval()


@torch.no_grad()
def difference(model: PreTrainedModel, file: Path, ids: list[int] = IDS) -> float:
    """Largest of any log-probability of any token, after several prefixes, as llama.cpp computes it from `file`."""
    ours = model(torch.tensor([ids])).logits[0].log_softmax(-1)  # [S, V]
    lengths = (1, 2, 7, len(ids))
    answers = ask(file, [], [ids[:n] for n in lengths], model.config.vocab_size)
    assert all(len(row) == model.config.vocab_size for row in answers.log_probabilities)
    return max(compared(ours[n - 1], row)[0] for n, row in zip(lengths, answers.log_probabilities, strict=True))


def channels(count: int, layers: int = 2) -> dict[str, int]:
    return {f"layer{i}_channels": count for i in range(layers)}


def heads(count: int, layers: int = 2) -> dict[str, int]:
    return {f"layer{i}_heads": count for i in range(layers)}


UNEVEN = {"layer0_channels": 10, "layer1_heads": 1}
EMPTY = {"layer0_heads": 0, "layer1_channels": 0}
EMPTY_LATE = {"layer1_heads": 0, "layer0_channels": 0}
BIASED = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.0, 4.0],
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 64,
}

CASES = {
    "llama": ("llama", {}, {}, "llama"),
    "llama, tied": ("llama", {}, TIED, "llama"),
    "llama, fewer heads": ("llama", heads(1) | channels(16), {}, "llama"),
    "llama, wide heads": ("llama", {}, {"head_dim": 16}, "llama"),
    "llama, biases": ("llama", {}, BIASED, "llama"),
    "llama, llama3 rope": ("llama", {}, {"rope_parameters": LLAMA3}, "llama"),
    "llama, linear rope": ("llama", {}, {"rope_parameters": LINEAR}, "llama"),
    "llama, yarn rope": ("llama", {}, {"rope_parameters": YARN}, "llama"),
    "llama, uneven": ("llama", UNEVEN, {}, "deci"),
    "llama, uneven, all else": (
        "llama",
        UNEVEN,
        BIASED | {"head_dim": 16, "rope_parameters": LLAMA3} | TIED,
        "deci",
    ),
    "llama, empty": ("llama", EMPTY, {}, "deci"),
    "llama, empty late": ("llama", EMPTY_LATE, {}, "deci"),
    "llama, empty, biases": ("llama", EMPTY, BIASED, "deci"),
    "llama, empty late, biases": ("llama", EMPTY_LATE, BIASED, "deci"),
    "llama, no attention, no channels": ("llama", EMPTY | EMPTY_LATE, {"num_hidden_layers": 3}, "deci"),
    "mistral": ("mistral", {}, {}, "llama"),
    "mistral, uneven": ("mistral", UNEVEN, {}, "deci"),
    "qwen2": ("qwen2", {}, {}, "qwen2"),
    "qwen2, yarn rope": ("qwen2", {}, {"rope_parameters": YARN}, "qwen2"),
    "qwen2, fewer heads": ("qwen2", heads(1), {}, "llama"),
    "qwen2, uneven": ("qwen2", UNEVEN, {}, "deci"),
    "qwen2, empty": ("qwen2", EMPTY, {}, "deci"),
    "qwen3": ("qwen3", {}, {}, "qwen3"),
    "qwen3, yarn rope": ("qwen3", {}, {"rope_parameters": YARN}, "qwen3"),
    "qwen3, wide heads": ("qwen3", heads(1), {"head_dim": 16}, "qwen3"),
    "qwen3, uneven": ("qwen3", UNEVEN, TIED, "openelm"),
    "qwen3, empty": ("qwen3", EMPTY, TIED, "openelm"),
    "qwen3, empty late, wide heads": ("qwen3", EMPTY_LATE, TIED | {"head_dim": 16}, "openelm"),
    "smollm3": ("smollm3", {}, TIED, "smollm3"),
    "smollm3, fewer heads": ("smollm3", heads(1, 4), {}, "smollm3"),
    "smollm3, all rotated": ("smollm3", UNEVEN, {"num_hidden_layers": 3}, "deci"),
    "phi3": ("phi3", {}, {}, "phi3"),
    "phi3, longrope of a part": ("phi3", {}, {"rope_parameters": LONG}, "phi3"),
    "phi3, fewer heads": ("phi3", heads(1), {}, "llama"),
    "phi3, uneven": ("phi3", UNEVEN, {}, "deci"),
    "olmo2": ("olmo2", channels(16), {}, "olmo2"),
    "olmo2, tied": ("olmo2", {}, TIED, "olmo2"),
    "gemma": ("gemma", {}, {}, "gemma"),
    "gemma, fewer heads": ("gemma", heads(1), {}, "gemma"),
    "gemma2": ("gemma2", {}, {"query_pre_attn_scalar": 20, "sliding_window": 8}, "gemma2"),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_the_model_does(case: str, tmp_path: Path) -> None:
    family, kept, changes, architecture = CASES[case]
    model = model_of(family, kept, **changes)
    written = export_gguf(model, TOKENIZER, tmp_path / "m.gguf", kind="f32")
    assert written.architecture == architecture
    assert difference(model, written.path) < (GELU if family.startswith("gemma") else 1e-4)


REFUSED = {
    "gemma, uneven": (
        "gemma",
        UNEVEN,
        {},
        "gemma takes layers of one width only; `graftlm export MODEL --format padded",
    ),
    "qwen3, uneven, not tied": ("qwen3", UNEVEN, {}, "openelm needs tied embeddings; `graftlm export MODEL"),
    "qwen3, biases": ("qwen3", {}, {"attention_bias": True}, "no place for the biases of k, o, q, v"),
    "olmo2, fewer heads": ("olmo2", heads(1), {}, "needs heads x their width .2 x 8. to be the hidden size 32"),
    "smollm3, uneven": ("smollm3", UNEVEN, {}, "smollm3 takes layers of one width only; .*deci has rotary positions"),
    "smollm3, biases": ("smollm3", {}, {"attention_bias": True}, "smollm3 has no place for the biases of o;"),
    "phi3, part of a head, fewer heads": ("phi3", heads(1), {"rope_parameters": LONG}, "llama has no longrope"),
    "llama, dynamic rope": (
        "llama",
        {},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "llama has no dynamic rope scaling; .*transformers opens it",
    ),
    "llama, another activation": ("llama", {}, {"hidden_act": "relu"}, "llama computes silu, not relu"),
    "gemma2, no cap": ("gemma2", {}, {"final_logit_softcapping": None}, "caps its logits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_architecture_holds_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    family, kept, changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as raised:
        export_gguf(model_of(family, kept, **changes), TOKENIZER, tmp_path / "m.gguf")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ("gemma", "gemma2", "qwen3", "smollm3"))
def test_what_is_refused_goes_padded(family: str, tmp_path: Path) -> None:
    model = model_of(family, {"layer0_channels": 10})
    stock = padded(model).eval()
    written = export_gguf(stock, TOKENIZER, tmp_path / "m.gguf")
    assert written.architecture == family
    assert difference(model, written.path) < (GELU if family.startswith("gemma") else 1e-4)


def test_every_family_has_a_target() -> None:
    assert set(CANDIDATES) == set(FAMILIES)
    assert {name for names in CANDIDATES.values() for name in names} == set(TARGETS)


def test_another_family_is_refused(tmp_path: Path) -> None:
    model = tiny_model("granite", vocab_size=264)
    with pytest.raises(UserError, match=r"no architecture .* is known for model type granite; it stays with"):
        export_gguf(model, TOKENIZER, tmp_path / "m.gguf")


def with_output_biases(model: PreTrainedModel) -> PreTrainedModel:
    """As bias compensation leaves a model: output projections with biases, where the family has none."""
    for layer in model.model.layers:
        for module in output_projections(layer):
            module.bias = torch.nn.Parameter(0.3 * torch.randn(module.out_features))
    return model


def test_output_biases_go_where_there_is_a_place_for_them(tmp_path: Path) -> None:
    cases = [("qwen2", UNEVEN, "deci"), ("qwen2", {}, "llama"), ("llama", UNEVEN, "deci")]
    cases += [("llama", EMPTY, "deci"), ("llama", EMPTY_LATE, "deci")]  # as FLAP leaves them with floors of 0
    for family, kept, architecture in cases:
        model = with_output_biases(model_of(family, kept))
        written = export_gguf(model, TOKENIZER, tmp_path / "m.gguf")
        assert written.architecture == architecture
        assert difference(model, written.path) < 1e-4
    with pytest.raises(UserError, match="openelm has no place for the biases of down, o"):
        export_gguf(with_output_biases(model_of("qwen3", UNEVEN, **TIED)), TOKENIZER, tmp_path / "m.gguf")


WIDE = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 96}


@pytest.mark.parametrize(("kind", "step"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)])
@pytest.mark.parametrize("family", ("llama", "qwen3"))
def test_fewer_bits_round_and_change_nothing_else(family: str, kind: str, step: float, tmp_path: Path) -> None:
    kept = {"layer0_channels": 32, "layer1_heads": 0, "layer1_channels": 0}
    model = model_of(family, kept, **WIDE, **TIED)
    exact = export_gguf(model, TOKENIZER, tmp_path / "exact.gguf", kind="f32")
    rounded = export_gguf(model, TOKENIZER, tmp_path / "rounded.gguf", kind=kind)
    read = {tensor.name: tensor for tensor in GGUFReader(rounded.path).tensors}
    if kind == "q8_0":  # zeros fill what is empty to a whole block, so compare what is there
        assert read["blk.1.ffn_down.weight"].shape.tolist() == [32, 64]
    from gguf.quants import dequantize

    for tensor in GGUFReader(exact.path).tensors:
        other = read[tensor.name]
        values = dequantize(other.data, other.tensor_type)
        assert other.tensor_type.name == ("F32" if len(tensor.shape) == 1 else kind.upper())
        if values.shape == tensor.data.shape:
            assert abs(values - tensor.data).max() <= step * abs(tensor.data).max()
    assert difference(model, rounded.path) < 0.3


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layer1_channels": 33}, "blk.1.ffn_down.weight has 33; .*--width-multiple 32"),
        ({}, None),
    ],
)
def test_q8_0_names_the_width_to_ask_for(kept: dict[str, int], message: str | None, tmp_path: Path) -> None:
    model = model_of("llama", kept, **WIDE)
    if message is None:
        assert difference(model, export_gguf(model, TOKENIZER, tmp_path / "m.gguf", kind="q8_0").path) < 0.3
    else:
        with pytest.raises(UserError, match=message):
            export_gguf(model, TOKENIZER, tmp_path / "m.gguf", kind="q8_0")
    for changes, said in (({"hidden_size": 48}, "hidden size is 48"), ({"head_dim": 8}, "2 heads of 8 are 16 wide")):
        with pytest.raises(UserError, match=f"{said}; take --quantize f16"):
            export_gguf(model_of("llama", {}, **{**WIDE, **changes}), TOKENIZER, tmp_path / "m.gguf", kind="q8_0")
    with pytest.raises(UserError, match=r"q4_k_m is not one of .*llama-quantize .*multiples of 256"):
        export_gguf(model, TOKENIZER, tmp_path / "m.gguf", kind="q4_k_m")


def test_a_window_that_the_target_has_not_bounds_the_context(tmp_path: Path) -> None:
    model = model_of("mistral", sliding_window=16)
    written = export_gguf(model, TOKENIZER, tmp_path / "m.gguf")
    assert "16 tokens of context" in written.notes[0]
    fields = GGUFReader(written.path).fields
    assert fields["llama.context_length"].contents() == 16
    assert difference(model, written.path, IDS[:15]) < 1e-4


def test_the_check_tells_a_wrong_file_from_a_right_one_and_leaves_nothing(tmp_path: Path) -> None:
    model, other = model_of("llama", UNEVEN), model_of("llama", UNEVEN, seed=1)
    file = tmp_path / "m.gguf"
    found = check(export_gguf(model, TOKENIZER, file).path, model, TOKENIZER, "f32")
    assert found.difference < 1e-5 and found.same_first == found.positions == 12
    before = file.read_bytes()
    for kind in ("f32", "f16"):
        with pytest.raises(UserError, match="the file was not kept"):
            export_gguf(
                model, TOKENIZER, file, inspect=lambda written, kind=kind: check(written, other, TOKENIZER, kind)
            )
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    file.write_text("nothing of the kind")
    with pytest.raises(UserError, match=r"llama\.cpp does not take it"):
        check(file, model, TOKENIZER, "f32")


FEWER = ("f16", "bf16", "q8_0")
SMALL = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_of_fewer_bits_takes_right_files_of_every_family(family: str, tmp_path: Path) -> None:
    for held in (torch.float32, torch.bfloat16):
        model = model_of(family, {}, **SMALL).to(held)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for kind in FEWER:
            file = export_gguf(model, TOKENIZER, tmp_path / "m.gguf", kind=kind).path
            found = check(file, model, TOKENIZER, kind)
            assert found.unexplained is not None and found.unexplained <= max(found.divergence, 1e-6)
        for name, value in model.state_dict().items():
            assert value.dtype == before[name].dtype and torch.equal(value, before[name])
        assert model(torch.tensor([IDS])).logits.dtype == held


@pytest.mark.parametrize("kind", FEWER)
@pytest.mark.parametrize("wrong", ("output biases", "one matrix by 30%", "norm", "two layers changed"))
def test_the_check_of_fewer_bits_finds_small_mistakes(kind: str, wrong: str, tmp_path: Path) -> None:
    model = model_of("llama", {}, **SMALL)
    other = copy.deepcopy(model)
    layers = other.model.layers
    with torch.no_grad():
        if wrong == "output biases":  # half as large as what surrounds them
            scale = 0.5 * float(model.model.layers[0].mlp(torch.randn(1, 64)).std())
            layers[0].mlp.down_proj.bias = torch.nn.Parameter(scale * torch.ones(64))
        elif wrong == "one matrix by 30%":
            layers[1].self_attn.v_proj.weight.mul_(1.3)
        elif wrong == "norm":
            layers[1].input_layernorm.weight.add_(0.5)
        else:
            other.model.layers[0].mlp, other.model.layers[1].mlp = layers[1].mlp, layers[0].mlp
    with pytest.raises(UserError, match="more than rounding explains"):
        export_gguf(
            model, TOKENIZER, tmp_path / "m.gguf", kind=kind, inspect=lambda file: check(file, other, TOKENIZER, kind)
        )


def test_an_error_in_the_middle_leaves_the_model_as_it_was() -> None:
    model = model_of("llama", {}, **SMALL).bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    failing = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), computing(model, torch.float64, GGMLQuantizationType.Q8_0):
        model(torch.tensor([IDS]))
    failing.remove()
    assert not model.model.layers[1].mlp.down_proj._forward_pre_hooks
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, before[name])


def test_metadata_says_what_the_file_is(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    model = model_of("llama", EMPTY)
    written = export_gguf(
        model,
        TOKENIZER,
        tmp_path / "m.gguf",
        name="small",
        licence="apache-2.0",
        heard=lambda done, tensors: heard.append((done, tensors)),
    )
    fields = {name: field.contents() for name, field in GGUFReader(written.path).fields.items()}
    assert fields["general.name"] == "small" and fields["general.license"] == "apache-2.0"
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [1, 4]  # the first layer's attention is one head of zeros
    assert fields["deci.feed_forward_length"] == [24, 1]
    assert '"num_attention_heads": 0' in fields["graftlm.layers"]
    assert heard[-1] == (written.tensors, written.tensors) and len(heard) == written.tensors


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    left, other = tmp_path / ".m.gguf.unfinished-abc", tmp_path / ".n.gguf.unfinished-abc"
    for path in (left, other):
        path.write_bytes(b"GGUF")
    export_gguf(model_of("llama"), build_tiny_tokenizer(), tmp_path / "m.gguf")
    assert not left.exists() and other.exists()
