"""Optimizers with states of 8 bits: regrouped, saved, loaded, counted, and refused in time."""

import dataclasses
import importlib.util

import pytest
import torch
from tiny_loop import REPEATED, begun, train
from tiny_models import tiny_model
from tiny_runs import tiny_config

from graftlm.checkpointing import load_optimizer, save_optimizer
from graftlm.errors import UserError
from graftlm.models import load_model
from graftlm.training.arguments import check_settings
from graftlm.training.estimates import estimate, remedies
from graftlm.training.plan import plan
from graftlm.training.run import train as train_run
from graftlm.training.run import train_one

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def small_states(parameters, **kwargs):
    """AdamW of 8 bits for tiny matrices too."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(parameters, min_8bit_size=16, **kwargs)


def test_eight_bits_train_and_resume(tmp_path):
    apex, optimizer = begun(tiny_model(), optimizer=small_states, stages=2, total_steps=6)
    plain, plain_optimizer = begun(tiny_model(), stages=2, total_steps=6)
    close = train(apex, optimizer, REPEATED[:4]), train(plain, plain_optimizer, REPEATED[:4])
    assert close[0] == pytest.approx(close[1], rel=0.02)
    assert any(s["state1"].dtype == torch.uint8 for s in optimizer.state.values())

    save_optimizer(tmp_path / "optimizer", optimizer, {"step": 4})
    weights = {k: v.clone() for k, v in apex.model.state_dict().items()}
    state = {k: v.clone() for k, v in apex.state_dict().items()}
    expected = train(apex, optimizer, REPEATED[4:8])

    model = tiny_model()
    other, other_optimizer = _again(model, weights, state)
    assert load_optimizer(tmp_path / "optimizer", other_optimizer) == {"step": 4}
    assert train(other, other_optimizer, REPEATED[4:8]) == expected


def _again(model, weights, state):
    from graftlm.apex import Apex
    from graftlm.apex_config import ApexConfig

    model.load_state_dict(weights)
    apex = Apex(model, ApexConfig(stages=2, k_heads=0.25, k_channels=0.25), total_steps=6)
    apex.load_state_dict(state)
    optimizer = small_states(model.parameters(), lr=1e-2, weight_decay=0.1)
    apex.start(optimizer)
    return apex, optimizer


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_runs(tmp_path, optim):
    pytest.importorskip("bitsandbytes")
    run = train_run(tiny_config(tmp_path, optim=optim, max_steps=6))
    assert (run / "model" / "model.safetensors").is_file()


def test_the_plan_counts_their_bytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    states = []
    for optim in ("adamw_torch", "adamw_8bit"):
        planned = estimate(tiny_config(tmp_path, optim=optim), load_model("tiny-llama"), 10)
        states.append(planned["memory"]["optimizer state"])
    assert states[1] < 0.75 * states[0]  # tiny-llama's smaller matrices keep 32 bits
    assert planned["peak_memory_with"].keys().isdisjoint({"optim: adamw_8bit"})


@pytest.mark.parametrize("check", [train_run, plan])
@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ("paged_adamw_8bit", "optim: paged_adamw_8bit needs bitsandbytes; pip install bitsandbytes"),
        ("lion_32bit", "optim: lion_32bit needs bitsandbytes"),
        ("adamw_torch_8bit", "cannot be kept in a checkpoint; use adamw_8bit"),
        ("adamw_9bit", "is no optimizer of transformers; try adamw_8bit"),
        ("galore_adamw", "asks for optim_target_modules, which no key sets"),
        ("stable_adamw", "needs optimi, which is not installed"),
    ],
)
def test_refused_before_data_is_read(tmp_path, monkeypatch, check, optim, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a))
    monkeypatch.setattr("graftlm.training.run.prepare_data", None)
    with pytest.raises(UserError, match=message):
        check(tiny_config(tmp_path, optim=optim))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit"])
def test_a_split_takes_no_state_that_cannot_be_taken_along(tmp_path, optim):
    with pytest.raises(UserError, match=f"apex.start: split takes .* that of {optim} does not allow"):
        train_run(tiny_config(tmp_path, optim=optim, apex={"start": "split"}))


def test_a_gpu_without_bfloat16_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(UserError, match="bf16: Tesla T4 computes no bfloat16"):
        train_one(tiny_config(tmp_path, bf16=True))


def test_what_to_change_has_numbers(tmp_path):
    config = tiny_config(tmp_path, per_device_train_batch_size=32, max_length=256)
    planned = estimate(config, load_model("tiny-llama"), 100)
    text = remedies(planned)
    assert text.startswith("; the plan expects ")
    assert "per_device_train_batch_size: 16 (gradient_accumulation_steps: 4)" in text
    assert "gradient_checkpointing: true" in text
    peaks = planned["peak_memory_with"]
    # Each is the plan of a run with that setting.
    for setting, changed in (
        ("gradient_checkpointing: true", {"gradient_checkpointing": True}),
        (
            "per_device_train_batch_size: 16 (gradient_accumulation_steps: 4)",
            {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4},
        ),
    ):
        again = estimate(dataclasses.replace(config, **changed), load_model("tiny-llama"), 100)
        rest = sum(v for k, v in again["memory"].items() if k != "process")
        ours = peaks[setting] - planned["memory"]["process"]
        assert ours == pytest.approx(rest, rel=0.05)
    assert "lower per_device_train_batch_size" in remedies(None)


def test_out_of_memory_says_what_to_change(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("graftlm.training.run_trainer.RunTrainer.training_step", fail)
    with pytest.raises(
        UserError, match=r"out of GPU memory at step 1; the plan expects .* with gradient_checkpointing"
    ):
        train_run(tiny_config(tmp_path, max_length=256, per_device_train_batch_size=8, gradient_accumulation_steps=1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim": "schedule_free_adamw"}, "optim: schedule_free_adamw is measured and saved at other weights"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type: reduce_lr_on_plateau follows evaluations"),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type: greedy follows evaluations"),
    ],
)
def test_what_this_trainer_does_not_do(changes, words, tmp_path):
    for refused in (plan, train_run):
        with pytest.raises(UserError, match=words):
            refused(tiny_config(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_a_decay_that_is_longer_than_the_run(tmp_path):
    told = {"lr_scheduler_type": "warmup_stable_decay", "warmup_ratio": 0.2}
    with pytest.raises(UserError, match="num_decay_steps: 6 and 2 steps of warmup are more than the run's 6"):
        train_run(tiny_config(tmp_path, max_steps=6, lr_scheduler_kwargs={"num_decay_steps": 6}, **told))
    train_run(tiny_config(tmp_path / "fits", max_steps=6, lr_scheduler_kwargs={"num_decay_steps": 4}, **told))


def test_bfloat16_that_is_emulated_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(UserError, match="bf16: an old card computes no bfloat16"):
        check_settings(tiny_config(tmp_path, bf16=True))


def test_names_that_are_known_pass(tmp_path):
    for optim in ("adamw_torch", "adamw_torch_fused", "adafactor"):
        check_settings(tiny_config(tmp_path, optim=optim))
