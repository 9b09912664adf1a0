"""SliceGPT: rotated it computes the same, sliced it meets the target."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, batches, tiny_model
from transformers import AutoModelForCausalLM

from graftlm.errors import UserError
from graftlm.models import load_model
from graftlm.pruning.methods.slicegpt import (
    _sliced_config,
    absorb_rotations,
    folded,
    parameters_at,
    principal_components,
)
from graftlm.pruning.prune import prune
from graftlm.pruning.saving import save_pruned
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.sliced_modeling import FAMILIES as SLICED
from graftlm.pruning.surgery import rebuilt
from graftlm.tiny import build_tiny_tokenizer

CANNOT = tuple(family for family in FAMILIES if family not in SLICED)
DATA = batches(3, rows=4)


def calibration(iteration: int):
    return DATA


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes):
    """With norm weights that show when they are folded wrongly."""
    model = tiny_model(family, dtype=dtype, **changes)
    model.set_attn_implementation("sdpa")  # what a checkpoint opens with; eager attention has a float32 softmax
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand(parameter.shape, generator=generator, dtype=dtype) + 0.5
    return model


def exact_norms(model) -> None:
    """Stock norms work in float32 whatever the model's dtype; these do not."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(
                lambda module, x: (
                    module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
                ),
                module,
            )


@pytest.mark.parametrize("family", SLICED)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_nothing_sliced_computes_the_same(family, tied, dtype, tolerance):
    model = model_of(family, dtype, tie_word_embeddings=tied)
    exact_norms(model)
    ids = DATA[0]["input_ids"]
    before = model(ids).logits.detach()
    full = folded(model)
    exact_norms(full)  # of queries and keys
    torch.testing.assert_close(full(ids).logits, before, rtol=0, atol=tolerance)
    with torch.no_grad():
        absorb_rotations(full, DATA, 32)
    torch.testing.assert_close(full(ids).logits, before, rtol=0, atol=tolerance)
    shortcuts = [layer.attention_shortcut for layer in full.model.layers]
    assert all((q - torch.eye(32, dtype=dtype)).abs().max() > 0.1 for q in shortcuts)  # it was rotated
    for q in shortcuts:
        torch.testing.assert_close(q.T @ q, torch.eye(32, dtype=dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", SLICED)
def test_target_saved_and_reopened(family, tmp_path):
    model = model_of(family)
    original = sum(p.numel() for p in model.parameters())
    pruned = prune(model, PruneSettings(method="slicegpt", target_parameters=original - 4000), calibration)
    width = pruned.model.config.hidden_size
    assert pruned.parameters == sum(p.numel() for p in pruned.model.parameters()) <= original - 4000
    assert parameters_at(pruned.model.config, width + 1) > original - 4000
    assert pruned.parameters == parameters_at(pruned.model.config, width)
    assert f"32 -> {width}" in pruned.notes[0]
    ids = DATA[0]["input_ids"]
    logits = pruned.model(ids).logits
    assert logits.shape == (*ids.shape, 64) and torch.isfinite(logits).all()
    save_pruned(pruned, build_tiny_tokenizer(), tmp_path / "sliced")
    again = load_model(str(tmp_path / "sliced"))
    assert torch.equal(again(ids).logits, logits)
    generated = again.generate(ids[:1, :4], max_new_tokens=4, do_sample=False)
    whole = again(generated[:, :-1], use_cache=False).logits.argmax(-1)[:, 3:]
    assert torch.equal(whole[0], generated[0, 4:])  # with a cache and without


@pytest.mark.slow
def test_opens_where_graftlm_is_not_installed(tmp_path):
    model = prune(model_of("llama"), PruneSettings(method="slicegpt", sparsity=0.4), calibration)
    save_pruned(model, build_tiny_tokenizer(), tmp_path / "sliced")
    torch.save({"logits": model.model(DATA[0]["input_ids"]).logits, "ids": DATA[0]["input_ids"]}, tmp_path / "want.pt")
    code = """
import sys
sys.modules["graftlm"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/sliced", trust_remote_code=True)
want = torch.load(sys.argv[1] + "/want.pt")
print(torch.equal(model(want["ids"]).logits, want["logits"]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("True"), done.stderr
    assert "auto_map" in json.loads((tmp_path / "sliced" / "config.json").read_text())


def test_slicing_keeps_what_the_signal_spans():
    """Embeddings in a plane, and blocks that stay in it: two dimensions are enough."""
    model = model_of("llama", torch.float64)
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(32, 2, generator=generator, dtype=torch.float64)).Q
    model.model.embed_tokens.weight.data @= plane @ plane.T
    for layer in model.model.layers:
        for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
            output.weight.data = plane @ plane.T @ output.weight.data
    ids = DATA[0]["input_ids"]
    before = model(ids).logits.detach()
    full = folded(model)
    with torch.no_grad():
        absorb_rotations(full, DATA, 2)
    for layer in full.model.layers:
        assert layer.attention_shortcut.shape == (2, 2) and layer.mlp.down_proj.weight.shape[0] == 2
    torch.testing.assert_close(full(ids).logits, before, rtol=0, atol=1e-4)  # the stock model's norms are in float32


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 9), st.integers(0, 1000))
def test_principal_components(size, seed):
    generator = torch.Generator().manual_seed(seed)
    signals = [torch.randn(2, 7, size, generator=generator) for _ in range(2)]
    masks = [torch.rand(2, 7, generator=generator) > 0.3 for _ in range(2)]
    found = principal_components(signals, masks)
    rows = torch.cat([x[m] for x, m in zip(signals, masks, strict=True)]).double()
    torch.testing.assert_close(found.T @ found, torch.eye(size, dtype=torch.float64))
    power = (rows @ found).square().sum(0)
    singular = torch.linalg.svdvals(rows).square()
    torch.testing.assert_close(power[: len(singular)], singular, rtol=1e-6, atol=1e-6)


def test_padding_does_not_count():
    ids = DATA[0]["input_ids"]
    padded = {
        "input_ids": torch.cat([ids, torch.full((4, 5), 9)], 1),
        "attention_mask": torch.cat([torch.ones(4, 12, dtype=torch.long), torch.zeros(4, 5, dtype=torch.long)], 1),
    }
    chosen = PruneSettings(method="slicegpt", sparsity=0.4)
    plain = prune(model_of("llama"), chosen, lambda i: [{"input_ids": ids}])
    other = prune(model_of("llama"), chosen, lambda i: [padded])
    assert plain.parameters == other.parameters
    torch.testing.assert_close(plain.model(ids).logits, other.model(ids).logits, rtol=0, atol=1e-3)


def test_few_tokens_are_told():
    pruned = prune(model_of("llama"), PruneSettings(method="slicegpt", sparsity=0.4), lambda i: batches(1, rows=1))
    assert any("12 calibration tokens are few" in note for note in pruned.notes)


@pytest.mark.parametrize("family", CANNOT)
def test_families_that_cannot_are_refused(family):
    with pytest.raises(UserError, match="llama, mistral, qwen2, qwen3, smollm3, phi3") as refused:
        prune(tiny_model(family), PruneSettings(method="slicegpt", sparsity=0.4), calibration)
    assert "\n" not in str(refused.value)


def test_a_layer_is_not_split_between_devices(family="llama"):
    sliced = prune(tiny_model(family), PruneSettings(method="slicegpt", sparsity=0.2), calibration).model
    layers = {type(layer).__name__ for layer in sliced.model.layers}
    assert layers == {"SlicedLlamaDecoderLayer"} <= set(sliced._no_split_modules)


def test_a_sliced_model_trains():
    model = prune(model_of("llama"), PruneSettings(method="slicegpt", sparsity=0.4), calibration).model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**DATA[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert isinstance(model, AutoModelForCausalLM._model_mapping[type(model.config)])


def test_each_basis_knows_what_was_sliced_before():
    """What enters every layer of the sliced model has its principal axes along the dimensions."""
    full = folded(model_of("llama", torch.float64))
    with torch.no_grad():
        absorb_rotations(full, DATA, 12)
    sliced = rebuilt(full, _sliced_config(full.config, 12), lambda _, tensor: tensor)
    seen: dict[int, list] = {}
    for number, module in enumerate([*sliced.model.layers, sliced.model.norm]):
        module.register_forward_pre_hook(
            lambda _module, given, number=number: seen.setdefault(number, []).append(given[0].flatten(0, 1))
        )
    with torch.no_grad():
        for batch in DATA:
            sliced(batch["input_ids"])
    assert len(seen) == len(sliced.model.layers) + 1
    for parts in seen.values():
        rows = torch.cat(parts).double()
        moments = rows.T @ rows
        assert (moments - moments.diag().diag()).norm() < 1e-4 * moments.norm()
