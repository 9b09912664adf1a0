"""The fused gate against the model's own two operations, by itself, as a Triton kernel, and inside models."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from activation_oracle import counts, recorder_of, same, train_pass
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_loop import REPEATED, begun, train
from tiny_models import FAMILIES, batches, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from graftlm import gate as gate_module
from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.errors import UserError
from graftlm.gate import gated_product, name_of
from graftlm.samples import Samples, count_tokens, find_samples
from graftlm.triton_kernels import triton_works

ORACLES = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x) * F.relu(x),
}


def sample_matrix(shape, attention_mask, position_ids):
    """Which token belongs to which sample, as 0 and 1 [n, T], told token by token."""
    rows, length = shape
    hidden = attention_mask is not None and not bool(attention_mask.all())
    samples = []
    for row in range(rows):
        tokens = [t for t in range(length) if not hidden or attention_mask[row, t]]
        documents = [tokens]
        if position_ids is not None and not hidden:
            documents = []
            for t in tokens:
                if t == 0 or position_ids[row, t] != position_ids[row, t - 1] + 1:
                    documents.append([])
                documents[-1].append(t)
        samples += [[row * length + t for t in d] for d in documents]
    packed = position_ids is not None and not hidden and len(samples) > rows
    samples = [s for s in samples if len(s) > (1 if packed else 0)]
    matrix = torch.zeros(len(samples), rows * length)
    for i, tokens in enumerate(samples):
        matrix[i, tokens] = 1
    return matrix


@st.composite
def structures(draw):
    """A shape, and perhaps a mask or positions."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    bits = st.lists(st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0])
    mask = torch.tensor(draw(bits)).long() if draw(st.booleans()) else None
    positions = None
    if draw(st.booleans()):
        starts = torch.tensor(draw(bits))
        positions = torch.zeros(shape, dtype=torch.int64)
        for t in range(1, shape[1]):
            positions[:, t] = (positions[:, t - 1] + 1) * ~starts[:, t]
    return shape, mask, positions


@settings(max_examples=150, deadline=None)
@given(structures())
def test_samples(structure):
    """On a CPU, and in the way that a GPU takes, which may not look at what the mask holds."""
    shape, mask, positions = structure
    expected = sample_matrix(shape, mask, positions)
    values = torch.rand(*shape, 5, dtype=torch.float64)
    for look in (True, False):
        found = find_samples(shape, mask, positions, values.device, look=look)
        valid = slice(None) if found.valid is None else found.valid
        sums = found.sum(values)[valid]
        torch.testing.assert_close(sums, expected.double() @ values.flatten(0, 1))
        assert int(found.tokens) == int(expected.sum())
        by_run = torch.zeros_like(found.sum(values))
        for begin, end, sample in found.pieces(0, shape[0] * shape[1]):
            by_run[sample] += values.flatten(0, 1)[begin:end].sum(0)
        torch.testing.assert_close(by_run[valid], sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_product_sums_and_gradients(dtype, data):
    """Bit for bit what the two operations give, and so are the gradients; sums to rounding in float32."""
    name = data.draw(st.sampled_from(sorted(ORACLES)))
    rows, length, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 90)), data.draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    gate, up, grad = (torch.randn(rows, length, channels, generator=generator).to(dtype) for _ in range(3))
    mask = (torch.rand(rows, length, generator=generator) < 0.8).long() if data.draw(st.booleans()) else None
    samples = find_samples((rows, length), mask, None, gate.device)
    ours, theirs = [[t.clone().requires_grad_() for t in (gate, up)] for _ in range(2)]
    old = gate_module.CHUNK
    gate_module.CHUNK = 32 * channels  # several chunks
    try:
        product, sums = gated_product(*ours, name, samples)
        product.backward(grad)
    finally:
        gate_module.CHUNK = old
    active = ORACLES[name](theirs[0])
    expected = active * theirs[1]
    expected.backward(grad)
    assert torch.equal(product, expected)
    assert torch.equal(ours[1].grad, theirs[1].grad)
    if name == "relu2":  # written otherwise than autograd's sum of two
        torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    else:
        assert torch.equal(ours[0].grad, theirs[0].grad)
    by_hand = samples.sum(active.detach().double().square())
    torch.testing.assert_close(sums.double(), by_hand, rtol=1e-6, atol=0)
    assert not sums.requires_grad
    assert gated_product(gate, up, name)[1] is None


KERNELS = """
import torch
from graftlm import gate, gate_kernels
from graftlm.samples import Samples, find_samples

def close(a, b, dtype):  # the interpreter cuts bfloat16 off where a GPU rounds
    torch.testing.assert_close(a.float(), b.float(), rtol=2e-6 if dtype == torch.float32 else 2**-6, atol=5e-6)

generator = torch.Generator().manual_seed(0)
for rows, length, channels, kind in [
    (2, 64, 128, "whole"), (3, 50, 130, "whole"), (2, 40, 24, "one"), (2, 70, 24, "mask"), (1, 150, 20, "packed"),
]:
    mask = positions = None
    if kind == "mask":
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[0, :9] = 0
    if kind == "packed":  # a document that ends with a chunk, padding, and one of two chunks
        positions = torch.cat([torch.arange(n) for n in (30, 34, 1, 1, 1, 80, 3)])[None]
    samples = find_samples((rows, length), mask, positions, torch.device("cpu"))
    if kind == "one":
        samples = Samples(1, rows, length)
    assert kind != "packed" or samples.count == 4
    for dtype in (torch.float32, torch.bfloat16):
        g, u, d = (torch.randn(rows, length, channels, generator=generator).to(dtype) for _ in range(3))
        for name in gate.ACTIVATIONS:
            ours, theirs = gate_kernels.forward(g, u, name, samples), gate.plain_forward(g, u, name, samples)
            close(ours[0], theirs[0], dtype)
            close(ours[1], theirs[1], dtype)
            assert gate_kernels.forward(g, u, name, None)[1] is None
            for a, b in zip(gate_kernels.backward(d, g, u, name), gate.plain_backward(d, g, u, name)):
                close(a, b, dtype)
print("same")
"""


def test_triton_kernels():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", KERNELS],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_activations_are_known_by_their_values():
    assert name_of(ACT2FN["silu"]) == "silu"
    assert name_of(ACT2FN["gelu"]) == "gelu"
    assert name_of(ACT2FN["gelu_pytorch_tanh"]) == "gelu_tanh"
    assert name_of(ACT2FN["relu2"]) == "relu2"
    assert name_of(nn.Sigmoid()) is None
    assert name_of(nn.PReLU(64)) is None


# -- in models ------------------------------------------------------------------------------------------------------


def both(family="llama", **inputs):
    """Recorders of one model with and without the fused gate."""
    return [recorder_of(tiny_model(family), fused_gate=fused) for fused in (False, True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_models_count_and_train_the_same(family):
    plain, fused = both(family)
    assert bool(fused.notes) == (family == "phi3")
    for batch in batches(3):
        for recorder in (plain, fused):
            recorder.model.train()(**batch).loss.backward()
    same(counts(fused), counts(plain), rtol=1e-6)
    for a, b in zip(plain.model.parameters(), fused.model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    if family != "phi3":
        before = dict(fused.model.named_modules())
        calls = []
        act = fused.model.model.layers[0].mlp.act_fn
        act.register_forward_hook(lambda *_: calls.append(1))
        train_pass(fused.model, batches(1)[0])
        assert not calls  # it was the fused gate
        fused.model.eval()(**batches(1)[0])
        assert calls
        fused.close()
        train_pass(fused.model, batches(1)[0])
        assert len(calls) > 1
        assert before.keys() == dict(fused.model.named_modules()).keys()


@pytest.mark.parametrize("kind", ["mask", "packed", "microbatch", "autocast", "reentrant", "checkpointing"])
def test_batches_of_every_kind(kind):
    per = "microbatch" if kind == "microbatch" else "sample"
    recorders = [recorder_of(tiny_model(), per=per, fused_gate=fused) for fused in (False, True)]
    inputs = {**batches(1, rows=3)[0], "use_cache": False}
    if kind in ("mask", "microbatch"):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, 5:] = 0
    if kind == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in (5, 4, 1, 1, 1)]).expand(3, -1)
    for recorder in recorders:
        if kind in ("reentrant", "checkpointing"):
            recorder.model.activation_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            for _ in range(2):
                loss = recorder.model.train()(**inputs).loss
        loss.backward()
    same(counts(recorders[1]), counts(recorders[0]), rtol=1e-6)
    assert recorders[1].samples["layer1_channels"] == {"packed": 12, "microbatch": 2}.get(kind, 6)
    for a, b in zip(*(r.model.parameters() for r in recorders), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_models(backend):
    torch._dynamo.reset()
    plain, fused = both()
    compiled = torch.compile(fused.model, backend=backend)
    for batch in batches(2):
        train_pass(plain.model, batch)
        fused.model.train()
        compiled(**batch).loss.backward()
    same(counts(fused), counts(plain), rtol=1e-5)


@pytest.mark.parametrize("regime", [{}, {"trains": "half", "budget": 0.7}, {"trains": "small", "budget": 0.2}])
def test_training_is_the_same_with_and_without(regime):
    losses = []
    for fused in (False, True):
        apex, optimizer = begun(tiny_model(), fused_gate=fused, stages=2, total_steps=6, **regime)
        losses.append(train(apex, optimizer, REPEATED[:6]))
        assert (apex.recorder._fused is not None) == fused
    assert losses[0] == losses[1]


def test_another_librarys_product_is_kept():
    """As Liger replaces it."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.forward = (lambda self, x: self.down_proj(x)).__get__(layer.mlp)
    recorder = recorder_of(model, fused_gate=True)
    assert any("another library" in note for note in recorder.notes)
    forward = model.model.layers[0].mlp.forward
    recorder.close()
    assert model.model.layers[0].mlp.forward == forward


def test_the_penalty_takes_the_models_own_product():
    losses = []
    for fused in (False, True):
        apex, optimizer = begun(tiny_model(), fused_gate=fused, activation_regularization=0.1)
        losses.append(train(apex, optimizer, REPEATED[:3]))
    assert losses[0] == losses[1]


# -- not every step -------------------------------------------------------------------------------------------------


def test_interval_counts_from_the_stage_and_tokens_always():
    apex, optimizer = begun(tiny_model(), assess_interval=2, stages=2, stage_length=3, total_steps=6)
    seen = []
    for i, batch in enumerate(REPEATED[:6]):
        train(apex, optimizer, [batch])
        seen.append(apex.recorder.samples["layer0_channels"])
        assert apex.recorder.tokens == (i + 1) * batch["input_ids"].numel()
    assert seen == [8, 8, 0, 8, 8, 16]  # the third step ended the stage


def test_interval_goes_on_after_a_resume():
    options = {"assess_interval": 3, "stages": 1}
    apex, optimizer = begun(tiny_model(), **options)
    train(apex, optimizer, REPEATED[:2])
    other = Apex(tiny_model(), ApexConfig(k_heads=0.25, k_channels=0.25, **options), total_steps=12)
    other.model.load_state_dict(apex.model.state_dict())
    other.load_state_dict(apex.state_dict())
    other_optimizer = torch.optim.AdamW(other.model.parameters(), lr=1e-2)
    other.start(other_optimizer)
    for _ in range(2):
        train(apex, optimizer, REPEATED[:1])
        train(other, other_optimizer, REPEATED[:1])
    assert apex.recorder.samples == other.recorder.samples == dict.fromkeys(apex.recorder.samples, 16)


@pytest.mark.parametrize("options", [{}, {"trains": "half", "budget": 0.8}])
def test_a_deep_copy_computes_with_its_own_weights(options):
    """As averages of weights and snapshots do: forwards that are replaced for training must not go along."""
    model = tiny_model()
    apex, _ = begun(model, stages=1, **options)
    ids = batches(1)[0]["input_ids"]
    snapshot = copy.deepcopy(model)
    expected = model(ids).logits.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for training in (False, True):
        torch.testing.assert_close(snapshot.train(training)(ids).logits, expected)
    apex.finish()


def test_bad_interval():
    with pytest.raises(UserError, match=r"apex.assess_interval: 0 must be at least 1"):
        ApexConfig(assess_interval=0)


def test_count_tokens_of_a_plain_batch():
    assert count_tokens({"input_ids": torch.zeros(2, 5)}) == 10
    assert Samples(2, 2, 5).tokens == 10


@pytest.mark.parametrize("switch, told", [(None, "python3-dev"), ("0", "")])
def test_triton_that_cannot_compile_is_gone_without(switch, told, monkeypatch, caplog):
    """It builds a part of itself at first use; in its place PyTorch's own operations do."""

    class Broken:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=Broken()))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    if switch:
        monkeypatch.setenv("GRAFTLM_TRITON", switch)
    triton_works.cache_clear()
    try:
        assert not triton_works() and not triton_works()
    finally:
        triton_works.cache_clear()
    assert told in caplog.text and len(caplog.records) == (1 if told else 0)
