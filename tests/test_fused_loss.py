"""The loss in chunks against the model's own."""

import dataclasses
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, batches, tiny_model
from tiny_runs import read_summary, tiny_config
from torch.nn import functional as F

from graftlm import fused_loss
from graftlm.errors import UserError
from graftlm.fused_loss import FusedLoss, linear_cross_entropy, unfit
from graftlm.models import load_model
from graftlm.training.arguments import fuse_loss, training_arguments
from graftlm.training.estimates import estimate
from graftlm.training.run import train


@pytest.fixture
def small_chunks(monkeypatch):
    """Three tokens of tiny models at a time."""
    monkeypatch.setitem(fused_loss.LOGITS_AT_ONCE, "cpu", 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_sum_and_gradients(dtype, data):
    tokens, hidden, vocabulary = (data.draw(st.integers(1, high)) for high in (20, 9, 30))
    softcap = data.draw(st.sampled_from([None, 2.0]))
    frozen = data.draw(st.sampled_from(["nothing", "hidden", "weight"]))
    scale = data.draw(st.sampled_from([1.0, 0.25]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    w = torch.randn(vocabulary, hidden, generator=generator).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.3] = -100
    pairs = []
    for ours in (True, False):
        a, b = (t.clone().requires_grad_(name != frozen) for t, name in ((x, "hidden"), (w, "weight")))
        if ours:
            old, fused_loss.LOGITS_AT_ONCE["cpu"] = fused_loss.LOGITS_AT_ONCE["cpu"], 4 * vocabulary
            try:
                loss = linear_cross_entropy(a, b, targets, softcap)
                with torch.no_grad():
                    torch.testing.assert_close(linear_cross_entropy(a, b, targets, softcap), loss.detach())
            finally:
                fused_loss.LOGITS_AT_ONCE["cpu"] = old
        else:
            logits = F.linear(a, b).to(torch.promote_types(dtype, torch.float32))
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            loss = F.cross_entropy(logits, targets, reduction="sum")
        (loss * scale).backward()
        pairs.append((loss.detach(), a.grad, b.grad))
    assert pairs[0][0].dtype == pairs[1][0].dtype
    torch.testing.assert_close(pairs[0][0], pairs[1][0], rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(pairs[0][1:], pairs[1][1:], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == dtype
            low = dtype == torch.bfloat16
            torch.testing.assert_close(ours, theirs, rtol=0.02 if low else 1e-5, atol=0.02 if low else 1e-6)


def both(family, **changes):
    models = [tiny_model(family, **changes).train() for _ in range(2)]
    return *models, FusedLoss(models[1])


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
@pytest.mark.parametrize("items", [None, 13, torch.tensor(13)])
def test_families(family, items, small_chunks):
    changes = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    plain, fused, handle = both(family, **changes)
    inputs = {**batches(1)[0], **({} if items is None else {"num_items_in_batch": items})}
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][0, :5] = -100
    outputs = [model(**inputs) for model in (plain, fused)]
    assert outputs[1].logits is None
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-6, atol=0)
    for output in outputs:
        output.loss.backward()
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6 * float(a.grad.abs().max()), msg=name)
    ids = inputs["input_ids"]
    assert torch.equal(fused(ids).logits, plain(ids).logits)
    handle.close()
    assert torch.equal(fused(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(fused(**inputs).loss, plain(**inputs).loss)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["autocast", "checkpointing", "frozen", "bfloat16"])
def test_ways_of_training(tied, how, small_chunks):
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    plain, fused, _ = both("llama", tie_word_embeddings=tied, dtype=dtype)
    losses = []
    for model in (plain, fused):
        if how == "checkpointing":
            model.activation_checkpointing_enable({"use_reentrant": False})
        if how == "frozen":
            model.lm_head.weight.requires_grad_(False)
        for batch in batches(2):  # gradients add up
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    low = how in ("autocast", "bfloat16")
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert (a.grad - b.grad).norm() <= (0.02 if low else 1e-5) * a.grad.norm()


def test_logits_never_exist_whole():
    """No tensor of tokens x vocabulary is made, nor saved."""
    model = tiny_model(vocab_size=4096).train()
    FusedLoss(model)
    ids = batches(1, rows=4, length=32, vocab=4096)[0]["input_ids"]
    sizes = []
    at_once, fused_loss.LOGITS_AT_ONCE["cpu"] = fused_loss.LOGITS_AT_ONCE["cpu"], 8 * 4096
    try:
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    finally:
        fused_loss.LOGITS_AT_ONCE["cpu"] = at_once
    sizes = [event.cpu_memory_usage for event in profile.events()]
    head = model.lm_head.weight.numel() * 4
    assert 0 < max(sizes) <= 2 * head < ids.numel() * 4096 * 4


def test_labels_of_another_shape():
    _, fused, _ = both("llama")
    batch = batches(1)[0]
    with pytest.raises(ValueError, match="differ in shape"):
        fused(batch["input_ids"], labels=batch["labels"], logits_to_keep=3)
    fused(**batch)  # and the next pass is not disturbed


def test_what_is_not_known_keeps_its_own_loss(tmp_path):
    model = tiny_model("granite", logits_scaling=2.0)
    assert "granite" in unfit(model)
    config = tiny_config(tmp_path)
    assert fuse_loss(config, model) is None
    with pytest.raises(UserError, match="fused_loss: family granite"):
        fuse_loss(dataclasses.replace(config, fused_loss=True), model)
    assert fuse_loss(dataclasses.replace(config, fused_loss=False), tiny_model()) is None
    assert fuse_loss(dataclasses.replace(config, torch_compile=True), tiny_model()) is None
    assert fuse_loss(config, tiny_model()) is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_liger_without_a_gpu(tmp_path):
    with pytest.raises(UserError, match="use_liger_kernel: needs a GPU"):
        training_arguments(tiny_config(tmp_path, use_liger_kernel=True))


def test_liger_is_told_what_is_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object())
    seen = {}
    made = SimpleNamespace(n_gpu=1)
    monkeypatch.setattr("graftlm.training.arguments.TrainingArguments", lambda **kwargs: seen.update(kwargs) or made)
    training_arguments(tiny_config(tmp_path, use_liger_kernel=True))
    assert seen["use_liger_kernel"] is True
    assert seen["liger_kernel_config"]["swiglu"] is False
    assert seen["liger_kernel_config"]["fused_linear_cross_entropy"] is True


def test_runs_come_out_the_same_and_the_plan_knows(tmp_path):
    ends = []
    for fused in (False, True):
        config = tiny_config(tmp_path / str(fused), fused_loss=fused)
        train(config)
        ends.append(read_summary(tmp_path / str(fused) / "run"))
    assert ends[1]["eval_loss_end"] == pytest.approx(ends[0]["eval_loss_end"], rel=1e-4)
    config = dataclasses.replace(config, per_device_train_batch_size=64, max_length=256)
    model = load_model("tiny-llama")
    peaks = [estimate(dataclasses.replace(config, fused_loss=f), model, 100)["memory"] for f in (False, True)]
    parts = [sum(bytes_ for name, bytes_ in peak.items() if name != "process") for peak in peaks]
    assert 0 < parts[1] < parts[0]


def test_labels_that_are_shifted_already():
    _, fused, _ = both("llama")
    ids = batches(1)[0]["input_ids"]
    shifted = ids.roll(3, dims=1)  # of something else than `labels`
    wanted = F.cross_entropy(tiny_model().train()(ids).logits.flatten(0, 1), shifted.flatten())
    torch.testing.assert_close(fused(ids, labels=ids, shift_labels=shifted).loss, wanted, rtol=1e-6, atol=0)


def test_many_chunks_keep_the_bits_of_the_weights_gradient(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator).bfloat16()
    w = torch.randn(16, 8, generator=generator).bfloat16()
    targets = torch.randint(0, 16, (400,), generator=generator)
    monkeypatch.setitem(fused_loss.LOGITS_AT_ONCE, "cpu", 16)  # a token a chunk
    weight = w.clone().requires_grad_()
    linear_cross_entropy(x, weight, targets, None).backward()
    exact = w.double().requires_grad_()
    F.cross_entropy(x.double() @ exact.T, targets, reduction="sum").backward()
    assert (weight.grad.double() - exact.grad).norm() < 5e-3 * exact.grad.norm()


def test_a_pass_that_fails_leaves_the_softcap():
    _, fused, _ = both("gemma2", final_logit_softcapping=3.0)
    ids = batches(1)[0]["input_ids"]
    with pytest.raises(IndexError):
        fused(ids + 10**6, labels=ids)
    assert fused.config.final_logit_softcapping == 3.0
