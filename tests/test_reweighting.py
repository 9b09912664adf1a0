"""Loss-based weights of samples."""

import dataclasses
import threading

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import batches, tiny_model
from tiny_runs import read_metrics, read_summary, tiny_config, write_chats
from torch.nn import functional as F

from graftlm.errors import UserError
from graftlm.methods.sparse_settings import ReweightingSettings
from graftlm.samples import find_samples
from graftlm.training import reweighting
from graftlm.training.control import control_config
from graftlm.training.reweighting import Reweighting, sample_losses, weights_of
from graftlm.training.run import train_one

STRATEGIES = ["linupper", "quadratic", "extremes"]


def slow_weights(losses: list[float], strategy: str, r: float) -> torch.Tensor:
    """As the paper writes them, one sample at a time."""
    low, high = min(losses), max(losses)
    found = []
    for loss in losses:
        h = -1 + 2 * (loss - low) / max(high - low, 1e-6)
        f = {"linupper": min(h + 1, 1), "quadratic": 1 - h * h, "extremes": abs(h)}[strategy]
        found.append(f / r)
    return torch.tensor(found, dtype=torch.float64).softmax(0)


@given(st.lists(st.floats(0.1, 9), min_size=2, max_size=6), st.sampled_from(STRATEGIES), st.floats(1e-3, 10))
@settings(max_examples=50, deadline=None)
def test_weights(losses, strategy, r):
    if max(losses) - min(losses) < 1e-3:
        losses = [losses[0]] * len(losses)
    found = weights_of(torch.tensor(losses, dtype=torch.float64), torch.ones(len(losses)), strategy, r)
    assert float(found.sum()) == pytest.approx(1)
    if max(losses) == min(losses):
        assert torch.allclose(found, torch.full_like(found, 1 / len(losses)))
    else:
        assert torch.allclose(found, slow_weights(losses, strategy, r))


def test_what_has_no_supervised_token_has_no_weight():
    found = weights_of(torch.tensor([2.0, 0.0, 3.0]), torch.tensor([4.0, 0.0, 1.0]), "linupper", 1.0)
    assert found[1] == 0 and float(found.sum()) == pytest.approx(1)
    assert found[2] > found[0]
    assert not weights_of(torch.zeros(2), torch.zeros(2), "linupper", 1.0).any()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("losses", [[3.0, 2.0], [2.5], [1.0, 1.0, 1.0]])
def test_however_small_r_is_weights_sum_to_one(losses, strategy):
    """The highest score of a micro-batch may be far below 1: of two samples, `quadratic` gives both 0."""
    found = weights_of(torch.tensor(losses), torch.ones(len(losses)), strategy, 1e-3)
    assert float(found.sum()) == pytest.approx(1)
    if strategy != "linupper":
        assert torch.allclose(found, torch.full_like(found, 1 / len(losses)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_are_over_all_processes(strategy, monkeypatch):
    """Of which the last has nothing that counts; threads stand for them."""
    losses, r = [[2.0, 3.0], [2.2], [9.0]], 0.004
    barrier, given, found = threading.Barrier(3, timeout=60), {}, {}

    def all_reduce(value, op=dist.ReduceOp.SUM):
        given[threading.get_ident()] = value.clone()
        barrier.wait()
        together = torch.stack(list(given.values()))
        barrier.wait()
        value.copy_(together.amax(0) if op == dist.ReduceOp.MAX else together.sum(0))

    def process(rank: int) -> None:
        own = torch.tensor(losses[rank], dtype=torch.float64)
        found[rank] = weights_of(own, torch.full_like(own, float(rank < 2)), strategy, r)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(reweighting, "world_size", lambda: 3)
    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert torch.allclose(torch.cat([found[0], found[1]]), slow_weights([2.0, 3.0, 2.2], strategy, r))
    assert not found[2].any()


def test_losses_of_packed_documents():
    model = tiny_model().eval()
    ids = batches(1, rows=2, length=12)[0]["input_ids"]
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    labels = ids.clone()
    labels[0, 5] = -100  # a document's first token
    labels[1, :6] = -100
    logits = model(ids, position_ids=positions, use_cache=False).logits
    samples = find_samples((2, 12), None, positions, ids.device)
    losses, counts = sample_losses(logits, labels, samples)
    assert counts.tolist() == [4, 6, 6]
    for n, (row, first, last) in enumerate([(0, 0, 5), (0, 5, 12), (1, 5, 12)]):
        expected = F.cross_entropy(logits[row, first : last - 1], ids[row, first + 1 : last])
        assert torch.allclose(losses[n], expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_gradient_is_that_of_the_weighted_sum(strategy):
    """Over two micro-batches of different sizes, against autograd through one sample after the other."""
    model = tiny_model()
    data = [batches(1, rows=3, length=8, seed=1)[0], batches(1, rows=2, length=8, seed=2)[0]]
    loss_of = Reweighting(ReweightingSettings(strategy, r=0.7, warmup_ratio=0.0), lambda: (0, 10))
    for batch in data:
        loss_of.watch(batch)
        loss_of(model.train()(batch["input_ids"]), batch["labels"], torch.tensor(35)).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    reference = tiny_model()
    for batch in data:
        one_by_one = [reference(input_ids=row[None], labels=row[None]).loss for row in batch["input_ids"]]
        weights = slow_weights([float(x.detach()) for x in one_by_one], strategy, 0.7)
        share = len(one_by_one) * 7 / 35
        sum(float(w) * share * x for w, x in zip(weights, one_by_one, strict=True)).backward()
    for name, p in reference.named_parameters():
        assert torch.allclose(found[name], p.grad, rtol=1e-4, atol=1e-6), name  # a batch rounds otherwise than its rows


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_samples_count_by_their_tokens_too(strategy):
    """As in the authors' code: n w_i t_i / t for t_i of t tokens."""
    model, batch = tiny_model().eval(), batches(1, rows=3, length=12)[0]
    labels = batch["labels"].clone()
    labels[0, :6], labels[2, :10] = -100, -100
    loss_of = Reweighting(ReweightingSettings(strategy, r=0.7, warmup_ratio=0.0), lambda: (0, 10))
    loss_of.watch(batch)
    found = loss_of(model(batch["input_ids"]), labels).detach()
    pairs = zip(batch["input_ids"], labels, strict=True)
    own = [float(model(input_ids=ids[None], labels=row[None]).loss.detach()) for ids, row in pairs]
    weights = slow_weights(own, strategy, 0.7)
    expected = sum(3 * float(w) * t / 19 * x for w, t, x in zip(weights, [6, 11, 2], own, strict=True))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_while_warming_up_samples_count_alike():
    model, batch = tiny_model(), batches(1, rows=4)[0]
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, :7] = -100  # the plain loss is that of tokens, whatever the samples' lengths
    told = [0]
    loss_of = Reweighting(ReweightingSettings("linupper", warmup_ratio=0.5), lambda: (told[0], 10))
    loss_of.watch(batch)
    outputs, items = model(batch["input_ids"]), (batch["labels"][:, 1:] != -100).sum()
    assert torch.allclose(loss_of(outputs, batch["labels"], items), model(**batch).loss)
    told[0] = 5
    assert not torch.allclose(loss_of(outputs, batch["labels"], items), model(**batch).loss)


def losses(folder) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "run") if line["event"] == "train"]


def run(folder, **changes):
    config = tiny_config(folder, **changes)
    train_one(config)
    return config


@pytest.mark.parametrize("method", ["full", "apex", "gmt"])
def test_a_run(method, tmp_path):
    """Blocks of one length that count alike have the plain loss; weights make another."""
    changes = {"method": method, "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    run(tmp_path / "plain", **changes)
    run(tmp_path / "alike", **changes, reweighting=ReweightingSettings("linupper", r=1e6, warmup_ratio=0.0))
    config = run(tmp_path / "weighed", **changes, reweighting=ReweightingSettings("extremes", r=0.2, warmup_ratio=0.0))
    plain, alike, weighed = (losses(tmp_path / name) for name in ("plain", "alike", "weighed"))
    assert alike[0] == pytest.approx(plain[0], rel=1e-6)
    assert alike == pytest.approx(plain, rel=1e-5)
    assert abs(weighed[0] - plain[0]) > 1e-4
    assert control_config(config, [0]).reweighting.strategy == "none"


def test_packed_conversations_and_accumulation(tmp_path):
    data = write_chats(tmp_path / "chats.jsonl")
    changes = {"method": "full", "max_steps": 3, "data": data, "task": "sft", "eval_data": (), "eval_fraction": 0.1}
    run(tmp_path / "weighed", **changes, reweighting=ReweightingSettings("linupper", warmup_ratio=0.0))
    assert all(0 < loss < 20 for loss in losses(tmp_path / "weighed"))
    assert read_summary(tmp_path / "weighed" / "run")["eval_loss_end"] is not None


def test_a_fused_loss_that_is_asked_for_cannot_be(tmp_path):
    config = tiny_config(tmp_path, method="full", reweighting=ReweightingSettings("linupper"))
    with pytest.raises(UserError, match="fused_loss: reweighting"):
        train_one(dataclasses.replace(config, fused_loss=True))
