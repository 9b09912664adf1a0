"""Plans of other methods than APEX: counted operations against torch's counter, and estimates against real runs."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console
from tiny_models import FAMILIES, batches, tiny_model
from tiny_runs import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from graftlm.errors import UserError
from graftlm.methods import METHODS, make_method
from graftlm.methods.adapter_settings import LoraSettings, ReloraSettings
from graftlm.methods.sparse_settings import HftSettings
from graftlm.models import load_model
from graftlm.training import costs
from graftlm.training.config import RunConfig, SourceConfig
from graftlm.training.estimates import estimate
from graftlm.training.method_costs import prepared, without_weights
from graftlm.training.plan import plan
from graftlm.training.run import train_one

ADAPTERS = ["lora", "dora", "rslora", "pissa", "olora", "eva", "lora_ga", "miss", "relora"]
ROWS, LENGTH = 2, 12


def config(method: str, **settings) -> RunConfig:
    lora = LoraSettings(**{"rank": 3, "eva_rho": 1.0, **settings.pop("lora", {})})
    given = {"data": (SourceConfig("x"),), "max_length": 32, "max_steps": 6, "per_device_train_batch_size": 2}
    return RunConfig(model="tiny-llama", method=method, lora=lora, **{**given, **settings})


def counted(method: str, family: str, given: RunConfig) -> int:
    """FLOPs of a forward and backward pass of the method on a real model."""
    model = tiny_model(family)
    made = make_method(model, given)
    made.prepare()
    with FlopCounterMode(display=False) as passes:
        model.train()(**batches(1, rows=ROWS, length=LENGTH)[0]).loss.backward()
    return passes.get_total_flops()


@pytest.mark.parametrize("target", ["all", "attention", "ffn"])
@pytest.mark.parametrize("family", ["qwen2", "phi3"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_flops_are_exact(method, family, target):
    given = config(method, lora={"target": target})
    ready = prepared(given, tiny_model(family), 6)
    parts = costs.token_flops(ready.model, None, LENGTH, ready.flops)
    once = ready.method.flops()[1]
    assert ROWS * LENGTH * (parts[0] + parts[1]).total + once == counted(method, family, given)


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
@pytest.mark.parametrize("method", ["s2ft", "hft", "gmt", "rmt", "lift"])
def test_flops_of_sparse_methods_are_exact(method, family):
    given = config(method)
    model = tiny_model(family)
    made = make_method(model, given)
    made.prepare()
    made.look(lambda samples: iter(batches(1)))
    made.start(torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), 6)
    with FlopCounterMode(display=False) as passes:
        model.train()(**batches(1, rows=ROWS, length=LENGTH)[0]).loss.backward()
    ready = prepared(given, tiny_model(family), 6)
    parts = costs.token_flops(ready.model, None, LENGTH, ready.flops)
    assert ROWS * LENGTH * (parts[0] + parts[1]).total == passes.get_total_flops()


@pytest.mark.parametrize("method", ["lora", "dora", "miss"])
def test_flops_with_dropout_are_exact(method):
    given = config(method, lora={"dropout": 0.1})
    ready = prepared(given, tiny_model(), 6)
    parts = costs.token_flops(ready.model, None, LENGTH, ready.flops)
    expected = counted(method, "llama", given)
    assert ROWS * LENGTH * (parts[0] + parts[1]).total + ready.method.flops()[1] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_without_weights_has_the_same_shapes(family):
    model = tiny_model(family)
    copied = without_weights(model)
    assert all(p.is_meta for p in copied.parameters()) and not any(p.is_meta for p in model.parameters())
    assert {n: p.shape for n, p in copied.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_an_estimate_leaves_the_model_and_the_random_state_alone(method):
    model = load_model("tiny-llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    planned = estimate(config(method), model, 8)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert 0 < planned["trainable_fraction"] <= 1 and planned["flops_per_step"] > 0
    assert planned["estimated_step_seconds"] > 0 and planned["estimated_peak_memory_bytes"] > 0
    assert planned["operator_parameters"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_counts_what_a_run_trains(method, tmp_path):
    lora = LoraSettings(rank=3, eva_rho=1.0, samples=4)
    given = tiny_config(tmp_path, method=method, lora=lora, max_steps=2)
    planned = estimate(given, load_model("tiny-llama"), 23)
    summary = train_one(given)
    assert planned["trainable_parameters"] == summary["trainable_parameters"]
    assert planned["trainable_fraction"] == summary["trainable_fraction"]
    assert summary["plan"]["trainable_parameters"] == summary["trainable_parameters"]


def test_adapters_need_less_memory_than_plain_training():
    model = load_model("tiny-llama")
    plain, lora = (estimate(config(method), model, 8) for method in ("full", "lora"))
    assert lora["memory"]["optimizer state"] < 0.2 * plain["memory"]["optimizer state"]
    assert lora["flops_per_step"] < plain["flops_per_step"]
    expected = sum(p.nbytes for p in model.parameters()) + 4 * lora["trainable_parameters"]
    assert lora["memory"]["weights"] == expected
    # exp_avg and exp_avg_sq, and a step count for each tensor
    assert lora["memory"]["optimizer state"] == pytest.approx(8 * lora["trainable_parameters"], rel=0.05)


def test_a_budget_is_the_whole_models_in_a_copy_of_fewer_layers():
    model = load_model("tiny-llama")
    given = config("lora", lora={"budget": 0.05})
    made = make_method(model, given)
    planned = estimate(given, model, 8)
    assert planned["trainable_parameters"] == made.size(made.rank) and made.rank > 1
    assert f"rank {made.rank}" in " ".join(planned["notes"])
    assert prepared(given, model, 6).config.lora.rank == made.rank


def test_what_looking_costs():
    model = load_model("tiny-llama")
    given = config("lora_ga", lora={"samples": 64})
    seconds = [estimate(g, model, 64)["estimated_assessment_seconds"] for g in (given, config("lora"))]
    assert seconds[0] > 0 == seconds[1]
    notes = " ".join(estimate(config("eva"), model, 64)["notes"])
    assert "how long eva looks at data before training is not in the time" in notes


def test_a_warm_start_needs_everything():
    model = load_model("tiny-llama")
    given = config("relora")
    warm = dataclasses.replace(given, relora=ReloraSettings(warm_start=0.5))
    a, b = (estimate(g, model, 8) for g in (given, warm))
    assert a["trainable_parameters"] == b["trainable_parameters"]
    assert b["memory"]["optimizer state"] > 5 * a["memory"]["optimizer state"]


def test_a_plan_says_when_things_happen():
    model, given = load_model("tiny-llama"), config("relora")
    assert "adapters are merged 2 times, after every 2 steps" in prepared(given, model, 6).notes[-1]
    assert not any("merged 2" in note for note in prepared(given, model, None).notes)  # nobody knows how long it is
    rounds = dataclasses.replace(given, method="hft", hft=HftSettings(round_steps=2))
    assert prepared(rounds, model, 6).notes[-1].endswith("in 3 rounds")
    late = dataclasses.replace(given, relora=ReloraSettings(warm_start=5_000))
    with pytest.raises(UserError, match=r"^relora\.warm_start: 5000 of the run's 6 steps"):
        estimate(late, model, 8)
    assert prepared(late, model, None) is not None


def test_a_plan_refuses_what_a_run_would():
    with pytest.raises(UserError, match=r"lora\.rank: 40 is above 32"):
        estimate(config("pissa", lora={"rank": 40}), load_model("tiny-llama"), 8)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_plan_on_the_console(method):
    out = io.StringIO()
    plan(config(method), console=Console(file=out, width=140))
    text = out.getvalue()
    assert f"plan: {'LoRA' if method == 'lora' else 'DoRA'}" in text
    assert "adapters of rank 3 on 28 linear layers" in text and "the method's own" in text
    assert "APEX" not in text and "operators" not in text
