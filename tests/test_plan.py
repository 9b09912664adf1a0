"""graftlm plan: counted operations against torch's own counter, and estimates against a run that took place."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_models import FAMILIES, batches, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.errors import UserError
from graftlm.models import load_model, load_tokenizer
from graftlm.training import costs, estimates
from graftlm.training import plan as plan_module
from graftlm.training.config import DistributedConfig, RunConfig, SourceConfig
from graftlm.training.control import control_config
from graftlm.training.data import prepare_data
from graftlm.training.data.materialise import padded_length
from graftlm.training.estimates import compare_plan, estimate
from graftlm.training.plan import model_for_shapes, plan
from graftlm.training.probe import measure
from graftlm.training.scaled_copy import cut

ROWS, LENGTH = 2, 12


def config(**settings) -> RunConfig:
    apex = settings.pop("apex", {})
    defaults = {"model": "tiny-llama", "data": (SourceConfig("x"),), "max_length": 32, "max_steps": 6}
    settings = defaults | {"per_device_train_batch_size": 2} | settings
    return RunConfig(apex=ApexConfig(**apex), **settings)


def counted(model, apex=None) -> tuple[int, int]:
    """FLOPs of a forward and backward pass, and of the rest of the step."""
    batch = batches(1, rows=ROWS, length=LENGTH)[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if apex is not None:
        apex.start(optimizer)
    with FlopCounterMode(display=False) as passes:
        model(**batch).loss.backward()
    with FlopCounterMode(display=False) as update:
        if apex is not None:
            apex.pull_back()
        optimizer.step()
    return passes.get_total_flops(), update.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_plain_training_are_exact(family):
    model = tiny_model(family)
    parts = costs.token_flops(model, None, LENGTH)
    assert ROWS * LENGTH * (parts[0] + parts[1]).total == counted(model)[0]


@pytest.mark.parametrize("operator", ["monarch", "dense", "diagonal"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("trains", ["full", "half", "small"])
@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_flops_of_apex_are_exact(family, trains, shared, operator):
    model = tiny_model(family)
    budget = {"full": None, "half": 0.75, "small": 0.1}[trains]
    settings = ApexConfig(
        k_heads=0.5, k_channels=0.25, stages=1, assessment="random", trains=trains, budget=budget, operator=operator,
        share_operators=shared,
    )  # fmt: skip
    apex = Apex(model, settings, total_steps=1)
    parts = costs.token_flops(model, apex, LENGTH)
    once, update = costs.pass_flops(apex), costs.step_flops(apex)
    assert counted(model, apex) == (ROWS * LENGTH * (parts[0] + parts[1]).total + once, update)


@pytest.mark.parametrize(
    "settings",
    [
        *({"assessment": name} for name in ("rank", "average", "magnitude", "gradient")),
        {"assess_interval": 4},
        {"fused_gate": False},
        {"expand": False},
        {"modules": ("o", "down")},
        {"activation_regularization": 0.1},
        {"keep_operator_moments": True},
    ],
    ids=str,
)
def test_flops_of_other_settings_are_exact(settings):
    """What looks at activations and weights multiplies no matrices."""
    model = tiny_model("qwen3")
    apex = Apex(model, ApexConfig(**{"k_heads": 0.5, "stages": 1, "assessment": "random", **settings}), total_steps=1)
    if settings.get("assessment") in ("rank", "average", "gradient"):
        apex.assess(batches(1, rows=ROWS, length=LENGTH))
    parts = costs.token_flops(model, apex, LENGTH)
    once, update = costs.pass_flops(apex), costs.step_flops(apex)
    assert counted(model, apex) == (ROWS * LENGTH * (parts[0] + parts[1]).total + once, update)


def test_estimating_leaves_the_model_and_the_random_state_alone():
    model = load_model("tiny-llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    estimate(config(apex={"trains": "half", "budget": 0.6}), model, None)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not hasattr(model, "apex") and not model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "settings",
    [
        *({"assessment": name} for name in ("average", "random", "magnitude", "gradient")),
        {"start": "split"},
        {"activation_regularization": 0.1},
        {"operator_learning_rate": "auto"},
        {"expand": False},
        {"modules": ("o", "down")},
        {"stages": 2, "stage_learning_rates": [1e-3, 1e-4]},
        {"stage_by": "tokens", "stage_length": 100},
    ],
    ids=str,
)
def test_every_way_of_apex_is_estimated(settings):
    planned = estimate(config(apex=settings), load_model("tiny-llama"), None)
    assert planned["memory"]["optimizer state"] > 0 and planned["flops_per_step"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_has_fewer_layers_and_tokens(family):
    model = tiny_model(family, num_hidden_layers=3)
    small = cut(model, 2, 16)
    loss = small(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss
    loss.backward()
    assert small.get_input_embeddings().weight.shape[0] == 16
    assert loss.isfinite() and all(p.grad is not None for p in small.parameters())
    assert len({p.data_ptr() for p in (*model.parameters(), *small.parameters())}) == len(
        [*model.parameters(), *small.parameters()]
    )


@pytest.mark.parametrize("trains", ["full", "half", "small"])
def test_what_a_copy_saves_scales_to_what_the_model_saves(trains):
    model = load_model("tiny-llama")
    given = config(apex={"trains": trains, "budget": None if trains == "full" else 0.6}, max_length=64)
    planned = estimate(given, model, None)
    whole = measure(given, model, rows=2, length=64, layers=4, trained=planned["trainable_parameters"])
    real = whole.saved_layers + whole.saved_rest + whole.saved_logits
    assert planned["memory"]["activations"] == pytest.approx(real, rel=0.05)


def test_checkpointing_takes_less_memory():
    model = load_model("tiny-llama")
    given = config(max_length=256, per_device_train_batch_size=8, per_device_eval_batch_size=1)
    plain = estimate(given, model, None)
    checkpointed = estimate(dataclasses.replace(given, gradient_checkpointing=True), model, None)
    assert checkpointed["flops_per_step"] == plain["flops_per_step"]  # recomputation is no work that the model needs
    assert 0 < checkpointed["flops"]["recomputed"] < plain["flops"]["forward"]
    assert checkpointed["memory"]["activations"] < 0.7 * plain["memory"]["activations"]


def test_optimizer_state_follows_the_optimizer():
    model = load_model("tiny-llama")
    adam, sgd = (estimate(config(optim=name), model, None)["memory"] for name in ("adamw_torch", "sgd"))
    parameters = sum(p.numel() for p in model.parameters())
    assert adam["optimizer state"] == pytest.approx(8 * parameters, rel=0.02)
    assert sgd.get("optimizer state", 0) == 0


@pytest.mark.parametrize(
    ("settings", "blocks", "steps"),
    [({"max_steps": 7}, None, 7), ({"max_steps": -1}, None, None), ({"max_steps": -1}, 9, 5),
     ({"max_steps": -1, "num_train_epochs": 2.5, "gradient_accumulation_steps": 2}, 9, 8)],
)  # fmt: skip
def test_steps_are_counted_as_trainer_counts_them(settings, blocks, steps):
    planned = estimate(config(**settings), load_model("tiny-llama"), blocks)
    assert planned["steps"] == steps
    assert (planned["estimated_seconds"] is None) is (steps is None)


def test_evaluations_are_those_that_a_run_makes():
    apex = {"stages": 3}
    assert estimates.evaluations(config(apex=apex, max_steps=30), 30) == 7  # start, and around each of three fusions
    assert estimates.evaluations(config(apex=apex, max_steps=30, eval_steps=10), 30) == 9  # not at the last step
    control = control_config(config(apex=apex, max_steps=30), [0, 10, 20])
    assert estimates.evaluations(control, 30) == 4  # start, where the stages began, end


@pytest.mark.parametrize(
    "by", [{"stage_by": "steps"}, {"stage_by": "epochs"}, {"stage_by": "tokens", "stage_length": 64}]
)
def test_stages_begin_where_they_should(by):
    given = config(max_steps=-1, num_train_epochs=2.0, apex={"stages": 2, **by})
    planned = estimate(given, load_model("tiny-llama"), 12)
    assert planned["stage_starts"] == ([0, 1] if by["stage_by"] == "tokens" else [0, 6])


def test_compare_plan():
    planned = {"estimated_seconds": 5.0, "estimated_peak_memory_bytes": 10, "steps": 3}
    compared = compare_plan(planned, {"seconds": 10.0, "peak_memory_bytes": 8})
    assert compared == planned | {"seconds_ratio": 0.5, "peak_memory_ratio": 1.25}
    assert compare_plan({"estimated_seconds": None}, {"seconds": 1.0}) == {"estimated_seconds": None}


def test_plan_prints_parts_and_formula(tmp_path, monkeypatch):
    console = Console(width=160, record=True, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    monkeypatch.setattr("graftlm.training.plan.machine_memory", lambda device: 1000)
    planned = plan(config(control=True), console=console)
    text = console.export_text()
    for part in ("trainable", "6 x L x H x (d_qk + d_v) x T", "beginning at step 0, 2, 4", "peak memory", "control"):
        assert part in text
    assert "the run does not fit" in text and "the control does not fit" in text
    assert "heads: K = 12.50% becomes 50.00%" in re.sub(r"\s+", " ", text)
    assert planned["control"]["operator_parameters"] == 0
    json.dumps(planned)


def test_plan_counts_small_data(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.txt"
    file.write_text("x" * 3199)  # with the end of text 3,200 tokens of a byte: 100 blocks, of which 2 are held back
    given = config(max_steps=-1, data=(SourceConfig(str(file)),))
    console = Console(width=160, record=True, quiet=True)
    told = []
    monkeypatch.setattr(
        "graftlm.training.plan.estimate", lambda *args, **known: told.append(known) or estimate(*args, **known)
    )
    assert plan(given, console=console)["steps"] == 49
    assert told[0]["evaluation_blocks"] == 2
    monkeypatch.setattr("graftlm.training.plan.PREPARED_AT_MOST", 0)
    assert plan(given, console=console)["steps"] == 3199 // 4 // 32 // 2  # 24 blocks, assumed; 2 a step
    assert told[1]["evaluation_blocks"] is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("settings", [{"trains": "half", "budget": 0.8}, {"trains": "small", "budget": 0.2}, {}])
def test_optimizer_state_of_slices_and_weights_of_other_numbers(settings, dtype):
    """Slices and operators train in float32 beside bfloat16 embeddings, of which two layers have a larger share than
    twelve."""
    model = tiny_model("llama", getattr(torch, dtype), num_hidden_layers=12, vocab_size=2048)
    k = {"k_heads": 0.25, "k_channels": 0.25}
    planned = estimate(config(dtype=dtype, apex={**k, **settings, "stages": 1}), model, None)
    apex = Apex(model, ApexConfig(**k, **settings, stages=1), total_steps=1)
    trained = [p for p in model.parameters() if p.requires_grad]
    exact = sum(2 * p.nbytes for p in trained)  # AdamW's two moments, in the parameter's own numbers
    assert planned["memory"]["optimizer state"] == pytest.approx(exact, rel=0.02)
    apex.finish()


def test_rows_that_are_padded_are_planned_as_long_as_they_get(tmp_path, monkeypatch):
    """One conversation in eight is long: so is a row of nearly every batch, and memory is that of the longest."""
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path / "cache"))
    turns = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok " * n}] for n in [300] + 7 * [5]]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in 4 * turns))
    given = config(task="sft", packing=False, max_length=1024, per_device_train_batch_size=8, eval_fraction=0.0,
                   chat_template="chatml", data=(SourceConfig(str(file)),))  # fmt: skip
    prepared = prepare_data(given, load_tokenizer("tiny-llama", chat_template="chatml"))
    lengths = [len(prepared.train[i]["input_ids"]) for i in range(len(prepared.train))]
    found = prepared.statistics
    assert (found.blocks, found.longest) == (32, max(lengths))
    random = np.random.default_rng(1)
    drawn = [random.permutation(lengths)[:8].max() for _ in range(2000)]
    assert padded_length(np.asarray(lengths * 100), 8) == pytest.approx(np.mean(drawn), rel=0.05)
    assert padded_length(np.asarray(lengths), 1) == pytest.approx(np.mean(lengths))
    assert padded_length(np.asarray(lengths), 99) == max(lengths)
    planned = plan(given, console=Console(quiet=True))
    assert planned["tokens_per_step"] == round(found.padded_length) * given.sequences_per_step
    full = estimate(dataclasses.replace(given, max_length=max(lengths)), load_model("tiny-llama"), None)
    assert planned["memory"]["activations"] == pytest.approx(full["memory"]["activations"], rel=0.1)


@pytest.mark.parametrize(("settings", "blocks", "evaluated"), [
    ({}, None, 64), ({}, 5, 5), ({}, 100, 64), ({}, 0, 0), ({"eval_max_blocks": 3}, 5, 3),
    ({"eval_fraction": 0.0}, None, 0),
])  # fmt: skip
def test_no_more_is_evaluated_than_there_is(settings, blocks, evaluated, monkeypatch):
    model, given = load_model("tiny-llama"), config(method="full", **settings)
    seconds = {"forward_layers": 10.0, "forward_rest": 0.0}  # measured, they would differ from one time to the next
    taken = lambda *args, **kwargs: dataclasses.replace(measure(*args, **kwargs), **seconds)  # noqa: E731
    monkeypatch.setattr(estimates, "measure", taken)
    one = estimate(config(method="full", eval_max_blocks=1), model, None)["estimated_evaluation_seconds"]
    planned = estimate(given, model, None, evaluation_blocks=blocks)
    assert one > 1
    assert planned["estimated_evaluation_seconds"] == pytest.approx(evaluated * one, rel=1e-3)


def test_a_folder_with_a_config_is_enough(tmp_path):
    AutoConfig.for_model(
        "qwen3", hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=96, vocab_size=500,
    ).save_pretrained(tmp_path)  # fmt: skip
    given = config(model=str(tmp_path))
    model = model_for_shapes(given)
    assert next(model.parameters()).is_meta
    planned = estimate(given, model, None)
    assert planned["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert planned["estimated_seconds"] > 0 and planned["memory"]["weights"] == 4 * planned["total_parameters"]


LAYERS = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    "intermediate_size": 256, "vocab_size": 300,
}  # fmt: skip


def spread(strategy: str, folder=None, **settings) -> RunConfig:
    model = {"model": str(folder)} if folder is not None else {}
    return config(distributed=DistributedConfig(strategy), **model, **settings)


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skeleton")
    AutoConfig.for_model("llama", **LAYERS).save_pretrained(folder)
    return folder


def test_fsdp2_divides_all_but_operators_and_ddp_nothing(skeleton):
    model = model_for_shapes(spread("none", skeleton))
    alone = estimate(spread("none", skeleton), model, None, gpus=1)
    ddp = estimate(spread("ddp", skeleton), model, None, gpus=4)
    fsdp2 = estimate(spread("fsdp2", skeleton), model, None, gpus=4)
    assert ddp["tokens_per_step"] == fsdp2["tokens_per_step"] == 4 * alone["tokens_per_step"]
    weights = 4 * alone["total_parameters"]
    assert alone["memory"]["weights"] == ddp["memory"]["weights"] == weights == 4 * fsdp2["memory"]["weights"]
    assert alone["memory"]["raw panels"] == ddp["memory"]["raw panels"] == 4 * fsdp2["memory"]["raw panels"]
    operators = 4 * alone["operator_parameters"]
    assert fsdp2["memory"]["operators"] == ddp["memory"]["operators"] == operators
    assert ddp["memory"]["DDP's buckets"] == weights and "DDP's buckets" not in fsdp2["memory"]
    state = [planned["memory"]["optimizer state"] for planned in (ddp, fsdp2)]
    assert state == pytest.approx([2 * (weights + operators), 2 * (weights / 4 + operators)], rel=0.01)
    assert "distributed.strategy: fsdp2" in ddp["peak_memory_with"]


def test_bytes_sent_follow_the_strategy_and_the_number_of_processes(skeleton):
    model = model_for_shapes(spread("none", skeleton))
    weights = 4 * sum(p.numel() for p in model.parameters())
    in_layers = 4 * sum(p.numel() for p in model.model.layers.parameters())
    assert estimate(spread("none", skeleton), model, None, gpus=1)["sent_bytes_per_step"] == {}
    ddp = estimate(spread("ddp", skeleton), model, None, gpus=4)["sent_bytes_per_step"]
    assert ddp == {"gradients averaged": 2 * weights * 3 // 4, "of operators": 0}
    given = spread("fsdp2", skeleton, bf16=True, gradient_accumulation_steps=2)
    planned = estimate(given, model, None, gpus=4)
    assert planned["sent_bytes_per_step"] == {  # gathered in two bytes, summed in four, for each micro-batch
        "weights gathered": 2 * (weights + in_layers) // 2 * 3 // 4,
        "gradients scattered": 2 * weights * 3 // 4,
        "biases' gradients": 0,
        "of operators": 2 * 4 * planned["operator_parameters"] * 3 // 4,
    }
    small = spread("ddp", skeleton, apex={"trains": "small", "budget": 0.1})
    sent = estimate(small, model, None, gpus=2)
    trained = sent["sent_bytes_per_step"]
    assert 0 < trained["of operators"] <= 4 * sent["operator_parameters"]
    assert trained["gradients averaged"] == 4 * (sent["trainable_parameters"] - sent["operator_parameters"])


@pytest.mark.parametrize("trains, budget", [("half", 0.6), ("small", 0.1)])
def test_fsdp2_divides_slices_and_all_that_comes_with_them(trains, budget, skeleton):
    model = model_for_shapes(spread("none", skeleton))
    apex = {"trains": trains, "budget": budget}
    given = spread("fsdp2", skeleton, apex=apex, gradient_accumulation_steps=2)
    alone, planned = (estimate(given, model, None, gpus=gpus) for gpus in (1, 4))
    for part in ("weights", "slices", "raw panels"):
        assert alone["memory"][part] == 4 * planned["memory"][part] > 0, part
    assert planned["memory"]["operators"] == alone["memory"]["operators"]
    operators = 4 * planned["operator_parameters"]
    trained = 4 * planned["trainable_parameters"] - operators  # slices, and in the half regime embeddings and LM head
    state = planned["memory"]["optimizer state"]
    assert state == pytest.approx(2 * (trained / 4 + operators), rel=0.01)
    weights = 4 * sum(p.numel() for p in model.parameters())
    in_layers = 4 * sum(p.numel() for p in model.model.layers.parameters())
    assert planned["sent_bytes_per_step"] == {  # frozen weights are gathered, and only what trains is scattered
        "weights gathered": 2 * (weights + in_layers) * 3 // 4,
        "gradients scattered": 2 * trained * 3 // 4,
        "biases' gradients": 0,
        "of operators": 2 * operators * 3 // 4,
    }
    replicated = estimate(spread("ddp", skeleton, apex=apex), model, None, gpus=4)
    assert replicated["peak_memory_with"]["distributed.strategy: fsdp2"] < replicated["estimated_peak_memory_bytes"]


def test_steps_of_an_epoch_are_those_of_all_processes(skeleton):
    model = model_for_shapes(spread("none", skeleton))
    planned = estimate(spread("ddp", skeleton, max_steps=-1), model, 33, gpus=4)
    assert (planned["steps_per_epoch"], planned["steps"]) == (5, 5)  # 8 sequences a step, the last one partial


def test_a_launcher_says_how_many_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    layouts = []
    monkeypatch.setattr(estimates, "measure", lambda *a, **k: layouts.append(k) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        estimate(spread("ddp"), load_model("tiny-llama"), None)
    assert layouts[0]["timed"]
    with pytest.raises(UserError, match="none is one process, and 2 processes were launched"):
        estimate(spread("none"), load_model("tiny-llama"), None)


def test_a_narrower_copy_saves_in_proportion(skeleton):
    """What a layer too large for this machine keeps, found on one of half and of a quarter of its width."""
    for settings in ({}, {"bf16": True}, {"apex": {"trains": "small", "budget": 0.2}}):
        given = spread("none", skeleton, max_length=64, **settings)
        model = model_for_shapes(given)
        weights = sum(p.numel() for p in model.model.layers[0].parameters())
        kwargs = {"rows": 2, "length": 64, "layers": 2, "trained": weights // 4, "timed": False}
        whole = measure(given, model, **kwargs)
        narrow = measure(given, model, **kwargs, at_most=weights // 3)
        assert (whole.narrowing, narrow.narrowing) == (1, 2)
        assert whole.forward_layers == narrow.forward_layers == 0
        for name in ("saved_layers", "hidden", "saved_rest", "saved_logits"):
            assert getattr(narrow, name) == pytest.approx(getattr(whole, name), rel=0.1), (settings, name)
        per_parameter = [probe.state_bytes / probe.trained for probe in (whole, narrow)]
        assert per_parameter[0] == pytest.approx(per_parameter[1], rel=0.01)


def test_fsdp2_keeps_no_copies_of_weights_and_activations_in_bfloat16(skeleton):
    autocast, sharded = (spread(strategy, skeleton, max_length=64, bf16=True) for strategy in ("ddp", "fsdp2"))
    model = model_for_shapes(autocast)
    kwargs = {"rows": 2, "length": 64, "layers": 2, "trained": 0, "timed": False}
    a, b = measure(autocast, model, **kwargs), measure(sharded, model, **kwargs)
    in_layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert a.copied_layers == 2 * in_layers and b.copied_layers == 0
    assert b.saved_layers < a.saved_layers  # norms and the residual stream too are in bfloat16
    assert a.state_bytes == b.state_bytes


def test_plan_for_gpus_that_are_not_there(skeleton):
    console = Console(width=160, record=True, quiet=True)
    planned = plan(spread("fsdp2", skeleton), gpus=8, console=console)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert planned["estimated_step_seconds"] is None and "process" not in planned["memory"]
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    plan(spread("fsdp2", skeleton), gpus=8, console=console)
    text = re.sub(r"\s+", " ", console.export_text())
    for part in ("APEX on 8 GPUs (fsdp2)", "of each GPU, in", "no GPU here", "by each GPU", "of operators", "gathered",
                 "less memory", "not known without a GPU"):  # fmt: skip
        assert part in text, part
    json.dumps(planned)


def test_what_cannot_be_divided_the_plan_says(skeleton):
    model = model_for_shapes(spread("fsdp2", skeleton))
    with pytest.raises(UserError, match="3 processes do not divide"):
        estimate(spread("fsdp2", skeleton), model, None, gpus=3)
    with pytest.raises(UserError, match="--gpus 2 asks for 2"):
        estimate(spread("none", skeleton), model, None, gpus=2)
    estimate(spread("fsdp2", skeleton, method="full"), model, None, gpus=3)  # nothing is mixed


def test_a_folder_with_a_config_counts_data_without_a_tokenizer(skeleton, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("x" * 3200)
    given = spread("none", skeleton, max_steps=-1, data=(SourceConfig(str(file)),))
    assert plan(given, console=Console(quiet=True))["steps"] == 13  # 25 blocks, assumed; 2 a step


def test_what_train_refuses_plan_refuses():
    with pytest.raises(UserError, match="trackio is not installed"):
        plan(config(report_to=("trackio",)), console=Console(quiet=True))
    with pytest.raises(UserError, match="no such folder"):
        model_for_shapes(dataclasses.replace(config(), model="./nowhere"))


def test_estimates_come_close(tmp_path):
    """One run in a process of its own, so that its peak of memory is its own. Large enough a micro-batch that
    activations show beside the interpreter. Time is held to a factor of 4 only: other work on the machine moves it."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 2000)
    run = tmp_path / "run"
    settings = ["max_length=256", "per_device_train_batch_size=24", "max_steps=2", "apex.stages=1", "eval_fraction=0",
                "apex.assess_samples=8", f"cache_dir={tmp_path / 'cache'}"]  # fmt: skip
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that wait for each other are no measure on a busy machine
    command = [sys.executable, "-m", "graftlm", "train", "--model", "tiny-llama", "--data", str(text), *settings]
    done = subprocess.run([*command, "--output-dir", str(run)], capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    planned = summary["plan"]
    assert planned["memory"]["activations"] > 100e6
    assert 0.5 < planned["peak_memory_ratio"] < 1.5
    # What the run added to the process it began as, which alone would hide an estimate of nothing.
    added = summary["peak_memory_bytes"] - planned["memory"]["process"]
    guessed = planned["estimated_peak_memory_bytes"] - planned["memory"]["process"]
    assert 0.4 < guessed / added < 2
    assert 0.25 < planned["seconds_ratio"] < 4


@pytest.mark.parametrize("peak, said", [(70, None), (72, "may not fit"), (81, "does not fit")])
def test_a_gpu_needs_room_beside_tensors(peak, said, monkeypatch):
    monkeypatch.setattr(plan_module, "machine_memory", lambda device: 80 * 10**9)
    monkeypatch.setattr(plan_module, "remedies", lambda estimated: "")
    layout = {"assumed": False, "device": "cuda"}
    found = plan_module._warnings(tiny_model(), {"layout": layout, "estimated_peak_memory_bytes": peak * 10**9})
    assert [said in warning for warning in found] == ([True] if said else [])
