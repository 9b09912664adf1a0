"""Models whose layers differ: saved, opened with and without this package, generated with, trained."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import FAMILIES as TRAINED
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from graftlm.export.verb import licence_of
from graftlm.models import has_own_class, load_model, load_skeleton, load_tokenizer
from graftlm.pruning import per_layer_modeling
from graftlm.pruning.base import Pruned, PruneStep
from graftlm.pruning.saving import save_pruned
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.shapes import shapes_of
from graftlm.pruning.surgery import add_output_biases, keep_components
from graftlm.reporting.card import model_card
from graftlm.tiny import build_tiny_tokenizer

FAMILIES = (*TRAINED, "gemma2")
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(3))
KEPT = {
    "layer0_heads": torch.tensor([1]),
    "layer0_channels": torch.tensor([0, 5, 6]),
    "layer1_channels": torch.arange(9),
}
EMPTY = {"layer0_channels": torch.arange(0), "layer1_heads": torch.arange(0)}


@torch.no_grad()
def logits(model, **given) -> Tensor:
    return model.eval()(IDS, use_cache=False, **given).logits


def per_layer(family: str = "llama", kept=KEPT, **changes) -> PreTrainedModel:
    return keep_components(tiny_model(family, **changes), kept).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_reopened_is_the_same(family, dtype, tmp_path):
    for i, kept in enumerate((KEPT, EMPTY)):
        model = per_layer(family, kept, dtype=dtype)
        folder = tmp_path / str(i)
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        assert type(again) is type(model)
        assert torch.equal(logits(again), logits(model))
        assert shapes_of(again) == shapes_of(model)
        decoder = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        with torch.no_grad():
            assert torch.equal(decoder(IDS)[0], model.model(IDS)[0])


@pytest.mark.parametrize("kept", [KEPT, EMPTY], ids=["widths", "nothing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_alike_in_every_way(family, kept):
    model = per_layer(family, kept)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    plain = model.generate(IDS, use_cache=False, **how)
    assert torch.equal(model.generate(IDS, use_cache=True, **how), plain)
    want = logits(model)
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
        configs = [module.config for module in model.modules() if hasattr(module, "config")]
        assert {config._attn_implementation for config in configs} == {"sdpa"}
        torch.testing.assert_close(logits(model), want, rtol=0, atol=5e-6)
    # a batch whose rows are padded on the left
    row = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1, :6]], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    batch, masks = torch.cat([IDS[1:], row]), torch.cat([torch.ones_like(mask), mask])
    padded = model.generate(batch, attention_mask=masks, **how)
    assert torch.equal(padded[1, 9:], model.generate(IDS[:1, :6], **how)[0, 6:])


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_static_cache(family):
    for kept in (KEPT, EMPTY):
        model = per_layer(family, kept)
        how = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
        static = model.generate(IDS, cache_implementation="static", **how)
        assert torch.equal(static, model.generate(IDS, **how))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3", "gemma2", "mistral", "phi3"])
def test_sliding_windows(family):
    """Where some layers see four tokens only: as masking says, with and without a cache."""
    types = {"layer_types": ["sliding_attention", "full_attention"]} if family not in ("mistral", "phi3") else {}
    changes = {"sliding_window": 4, "use_sliding_window": True, **types}
    model = per_layer(family, {"layer0_channels": torch.arange(24), "layer1_channels": torch.arange(3)}, **changes)
    stock = tiny_model(family, **changes).eval()
    for layer in stock.model.layers[1:]:
        layer.mlp.down_proj.weight.data[:, 3:] = 0
    torch.testing.assert_close(logits(model), logits(stock), rtol=0, atol=5e-6)
    wide = tiny_model(family, **{**changes, "sliding_window": 64})
    assert not torch.allclose(logits(wide), logits(tiny_model(family, **changes)), atol=1e-3)  # the window matters
    how = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **how), model.generate(IDS, use_cache=False, **how))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family):
    """Every parameter gets a gradient, which data parallelism waits for; that of a norm before nothing is zero."""
    for kept in (KEPT, EMPTY):
        model = per_layer(family, kept).train()
        model(IDS, labels=IDS).loss.backward()
        plain = {name: p.grad.clone() for name, p in model.named_parameters()}
        assert all(grad.isfinite().all() for grad in plain.values())
        zero = {name for name, grad in plain.items() if grad.numel() and not grad.any()}
        assert not zero if kept is KEPT else all("norm" in name for name in zero)
        model.zero_grad()
        model.activation_checkpointing_enable()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        for name, p in model.named_parameters():
            assert torch.equal(p.grad, plain[name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_can_grow(tied, tmp_path):
    model = per_layer(tie_word_embeddings=tied)
    want = logits(model)
    model.resize_token_embeddings(70)
    torch.testing.assert_close(logits(model)[..., :64], want, rtol=0, atol=0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert again.config.vocab_size == 70
    assert torch.equal(logits(again), logits(model))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_held_in_another_type():
    model = per_layer()
    want = logits(model)
    model.to(torch.float64)
    torch.testing.assert_close(logits(model).float(), want, rtol=0, atol=5e-6)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.half().float()
    assert logits(model).isfinite().all()


def test_hidden_states_and_attentions():
    out = per_layer(kept=EMPTY)(IDS, output_hidden_states=True, output_attentions=True, use_cache=False)
    assert len(out.hidden_states) == 3
    assert len(out.attentions) == 1  # the other layer has none


@pytest.mark.slow
def test_traced_by_the_compiler():
    for kept in (KEPT, EMPTY):
        model = per_layer(kept=kept)
        with torch.no_grad():
            compiled = torch.compile(model, backend="eager")(IDS, use_cache=False).logits  # traced, not made into code
        torch.testing.assert_close(compiled, logits(model), rtol=0, atol=5e-6)


def test_uniform_is_a_stock_checkpoint(tokenizer, tmp_path):
    uniform = {f"layer{i}_{kind}": torch.arange(n) for i in (0, 1) for kind, n in (("heads", 1), ("channels", 7))}
    model = per_layer("llama", uniform)
    assert not has_own_class(model)
    save_pruned(model, tokenizer, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["model_type"] == "llama"
    assert not {"auto_map", "per_layer_config"} & config.keys()
    assert not list((tmp_path / "m").glob("*.py"))
    card = (tmp_path / "m/README.md").read_text()
    assert "which stock transformers opens" in card and "trust_remote_code" not in card
    # pruned from a model that had layers of different widths, too
    model = keep_components(per_layer(kept={"layer0_channels": torch.arange(7)}), {"layer1_channels": torch.arange(7)})
    save_pruned(model, tokenizer, tmp_path / "n")
    config = json.loads((tmp_path / "n/config.json").read_text())
    assert config["model_type"] == "llama"
    assert not {"auto_map", "per_layer_config"} & config.keys()


WITHOUT = """
import importlib.abc, sys, torch
class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "graftlm":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone())
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
given = torch.load("io.pt", weights_only=True)
ids, how = given["ids"], {"trust_remote_code": True}
everything = {}
for name in given["names"]:
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager", **how).eval()
    decoder = AutoModel.from_pretrained(name, attn_implementation="eager", **how).eval()
    found = {"text": AutoTokenizer.from_pretrained(name, **how)("hello").input_ids}
    with torch.no_grad():
        found["logits"], found["hidden"] = model(ids, use_cache=False).logits, decoder(ids)[0]
    found["generated"] = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.save_pretrained(name + "-again")
    everything[name] = found
torch.save(everything, "io.pt")
assert not [name for name in sys.modules if name.partition(".")[0] == "graftlm"]
"""


def test_opens_where_this_package_is_not(tokenizer, tmp_path, monkeypatch):
    models = {"widths": per_layer(), "nothing": per_layer(kept=EMPTY)}
    bias = torch.arange(32) / 32
    models["biases"] = add_output_biases(per_layer("phi3", EMPTY), {0: (None, bias), 1: (bias, None)}).eval()
    for name, model in models.items():
        save_pruned(model, tokenizer, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    torch.save({"ids": IDS, "names": list(models)}, tmp_path / "io.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "io.pt", weights_only=True)
    for name, model in models.items():
        assert torch.equal(found[name]["logits"], logits(model))
        with torch.no_grad():
            assert torch.equal(found[name]["hidden"], model.model(IDS)[0])
        assert torch.equal(found[name]["generated"], model.generate(IDS, max_new_tokens=4, do_sample=False))
        assert found[name]["text"] == tokenizer("hello").input_ids
        # what it saved opens again here
        again = load_model(str(tmp_path / f"{name}-again"), attn_implementation="eager")
        assert torch.equal(logits(again), logits(model))


def test_older_transformers_are_told_so():
    """By the file itself, before it asks for what they lack."""
    alone = (
        "import runpy, sys, types\n"
        "sys.modules['transformers'] = older = types.ModuleType('transformers')\n"
        "older.__version__ = '4.57.1'\n"
        f"runpy.run_path({per_layer_modeling.__file__!r})"
    )
    done = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True)
    assert "needs transformers 5.14 or newer, and this is 4.57.1" in done.stderr.splitlines()[-1]


def test_opening_here_runs_nothing_of_the_folder(tokenizer, tmp_path):
    model = per_layer()
    save_pruned(model, tokenizer, tmp_path)
    code = next(tmp_path.glob("*.py"))
    assert code.read_text() == Path(sys.modules[type(model).__module__].__file__).read_text()
    code.write_text("raise SystemExit('was run')\n")
    for trust in (False, True):
        again = load_model(str(tmp_path), attn_implementation="eager", trust_remote_code=trust)
        assert torch.equal(logits(again), logits(model))
        skeleton = load_skeleton(str(tmp_path), trust_remote_code=trust)
        assert shapes_of(skeleton) == shapes_of(model)
        assert load_tokenizer(str(tmp_path), trust_remote_code=trust)("hello") == tokenizer("hello")


@pytest.mark.slow
def test_the_class_is_imported_for_those_models_only():
    code = (
        "import sys; from graftlm.models import load_model, load_skeleton; load_model('tiny-llama');"
        "assert not [m for m in sys.modules if m.endswith(('per_layer_modeling', 'sliced_modeling'))]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_lies_beside_the_weights(tokenizer, tmp_path):
    original = tiny_model()
    shapes, parameters = shapes_of(original), original.num_parameters()
    model = keep_components(original, KEPT)
    after = tuple(shapes_of(model))
    step = PruneStep(1, model.num_parameters(), after, (0.5, -0.5), 1.25)
    settings = PruneSettings(sparsity=0.2)

    pruned = Pruned(
        model, settings, tuple(shapes), parameters, after, model.num_parameters(), (step,), KEPT, 2.5, ("a | note",)
    )
    save_pruned(pruned, tokenizer, tmp_path, base_model="owner/tiny-1M", data="wiki text", extra={"loss": 3.5})
    said = json.loads((tmp_path / "pruning.json").read_text())
    assert said["settings"]["sparsity"] == 0.2
    assert said["original_parameters"] == parameters
    assert said["parameters"] == sum(p.numel() for p in load_model(str(tmp_path)).parameters())
    assert (
        said["shapes"]
        == said["steps"][0]["shapes"]
        == [
            {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 3},
            {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 9},
        ]
    )
    assert said["steps"][0]["layer_importance"] == [0.5, -0.5]
    assert said["loss"] == 3.5
    assert said["environment"]["packages"]["torch"] == torch.__version__
    card = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "owner/tiny-1M" and "pruned" in head["tags"]
    assert "| 0 | 2 of 4 | 1 of 2 | 3 of 24 |" in card
    assert "| 1 | 4 of 4 | 2 of 2 | 9 of 24 |" in card
    assert "trust_remote_code=True" in card and "load_model(" in card and "wiki text" in card
    assert "Adapt-Pruner" in card and "a \\| note" in card


def test_the_licence_stays(tokenizer, tmp_path):
    model = tiny_model()
    save_pruned(keep_components(model, KEPT), tokenizer, tmp_path / "one")
    card = tmp_path / "one" / "README.md"
    card.write_text("---\nlicense: llama3.2\nlanguage: [en]\ndatasets: [a/b]\n---\n# Small\n")
    pruned = keep_components(tiny_model(), KEPT)
    save_pruned(pruned, tokenizer, tmp_path / "two", base_model=str(tmp_path / "one"))
    assert licence_of(tmp_path / "two") == "llama3.2"
    head = yaml.safe_load((tmp_path / "two" / "README.md").read_text().split("---")[1])
    assert head["language"] == ["en"] and "datasets" not in head
    summary = {"method": "full", "steps": 1}
    assert "license: llama3.2" in model_card(summary, {}, str(tmp_path / "one"))


def test_nothing_is_written_by_halves(tokenizer, tmp_path, monkeypatch):
    save_pruned(per_layer(), tokenizer, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def fail(*_, **__):
        raise RuntimeError("killed")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(RuntimeError):
        save_pruned(per_layer("qwen2"), tokenizer, tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
