"""The loss with a teacher, in chunks, against the same written out; and in whole runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import batches, tiny_model
from tiny_runs import read_summary, tiny_config
from torch.nn import functional as F

from graftlm import fused_loss
from graftlm.distilled_loss import DistilledLoss, Mixture, _LinearDistillation
from graftlm.errors import UserError
from graftlm.training.config import DistillationConfig
from graftlm.training.run import train_one


def written_out(ours, theirs, targets, weight, heat):
    """Token by token, in double precision."""
    total = ours.new_zeros((), dtype=torch.float64)
    for z, t, target in zip(ours.double(), theirs.double(), targets.tolist(), strict=True):
        if target == -100:
            continue
        p, q = torch.softmax(t / heat, 0), torch.softmax(z / heat, 0)
        total = total + weight * heat**2 * (p * (p.log() - q.log())).sum()
        total = total - (1 - weight) * torch.softmax(z, 0)[target].log()
    return total


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_sum_and_gradients(data):
    tokens, hidden, wider, vocabulary = (data.draw(st.integers(1, high)) for high in (12, 6, 6, 20))
    weight, heat = data.draw(st.sampled_from([1.0, 0.5, 0.1])), data.draw(st.sampled_from([1.0, 3.0]))
    caps = data.draw(st.sampled_from([(None, None), (2.0, None), (2.0, 3.0)]))
    frozen = data.draw(st.sampled_from(["nothing", "hidden", "weight"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x, w = torch.randn(tokens, hidden, generator=generator), torch.randn(vocabulary, hidden, generator=generator)
    tx, tw = torch.randn(tokens, wider, generator=generator), torch.randn(vocabulary, wider, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.3] = -100
    found = []
    for ours in (True, False):
        a, b = (t.clone().requires_grad_(name != frozen) for t, name in ((x, "hidden"), (w, "weight")))
        if ours:
            old, fused_loss.LOGITS_AT_ONCE["cpu"] = fused_loss.LOGITS_AT_ONCE["cpu"], 20 * vocabulary
            loss = _LinearDistillation.apply(a, b, targets, tx, tw, Mixture(weight, heat, *caps))
            fused_loss.LOGITS_AT_ONCE["cpu"] = old
        else:
            capped = [
                z if cap is None else cap * torch.tanh(z / cap)
                for z, cap in zip((F.linear(a, b), F.linear(tx, tw)), caps, strict=True)
            ]
            loss = written_out(*capped, targets, weight, heat)
        if loss.requires_grad:
            (0.5 * loss).backward()
        found.append((loss.detach().double(), a.grad, b.grad))
    for ours, theirs in zip(*found, strict=True):
        if frozen == "nothing" or ours is not None:
            torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-4, atol=1e-4)


def test_in_a_model(monkeypatch):
    """Padding, several chunks, another teacher; and evaluation has the model's own loss."""
    monkeypatch.setitem(fused_loss.LOGITS_AT_ONCE, "cpu", 3000)
    model, teacher = tiny_model("llama"), tiny_model("gemma2")
    [batch] = batches(1)
    labels = batch["input_ids"].clone()
    labels[0, :5] = -100
    inputs = {**batch, "labels": labels}
    model.train()
    with torch.no_grad():
        theirs = teacher(**batch).logits
    logits = model(**batch).logits
    supervised = int((labels[:, 1:] != -100).sum())
    expected = written_out(
        logits[:, :-1].flatten(0, 1), theirs[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), 0.7, 2.0
    )
    (expected / supervised).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plain = model.eval()(**inputs).loss
    loss = DistilledLoss(model.train(), teacher, weight=0.7, temperature=2.0)
    output = model(**inputs)
    output.loss.backward()
    torch.testing.assert_close(output.loss.double(), expected / supervised, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in teacher.parameters())
    torch.testing.assert_close(model.eval()(**inputs).loss, plain)
    loss.close()
    torch.testing.assert_close(model(**inputs).loss, plain)


def test_runs(tmp_path):
    """With next to no share of the teacher a run is what it is without; with all of it, not."""
    losses = {}
    for name, weight in (("none", None), ("little", 1e-9), ("all", 1.0)):
        told = DistillationConfig() if weight is None else DistillationConfig(teacher="tiny-llama", weight=weight)
        config = tiny_config(tmp_path / name, method="full", max_steps=3, distillation=told)
        train_one(config, lean=True)
        losses[name] = read_summary(tmp_path / name / "run")["eval_loss_end"], config
    assert losses["little"][0] == pytest.approx(losses["none"][0], abs=1e-4)
    # The teacher is the model as it was: what it says is no reason to change.
    start = read_summary(tmp_path / "all" / "run")["eval_loss_start"]
    assert losses["all"][0] == pytest.approx(start, abs=2e-2)
    assert losses["none"][0] < start - 0.05


def test_what_does_not_go_together(tmp_path):
    with pytest.raises(UserError, match=r"fused_loss: does not go with distillation\.teacher"):
        tiny_config(tmp_path, fused_loss=False, distillation=DistillationConfig(teacher="tiny-llama"))
    with pytest.raises(UserError, match=r"distillation\.temperature: 0 must be above 0"):
        DistillationConfig(temperature=0)
    model, teacher = tiny_model("llama"), tiny_model("llama", vocab_size=80)
    with pytest.raises(UserError, match="has 80 logits and the model 64"):
        DistilledLoss(model, teacher, weight=1, temperature=1)
    assert model(**batches(1)[0]).logits is not None  # its own loss is back


def test_the_teacher_has_no_dropout():
    student, teacher = tiny_model().train(), tiny_model(seed=1, attention_dropout=0.5).train()
    DistilledLoss(student, teacher, weight=1.0, temperature=1.0)
    batch = batches(1)[0]
    assert not teacher.training
    assert student(**batch).loss.item() == student(**batch).loss.item()
