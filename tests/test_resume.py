"""Killed with -9 at any moment and resumed, a run ends with the same bits as one that was left alone."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from own_process import exit_code, left_alone
from tiny_runs import (
    assert_same_run,
    control_of,
    files_of,
    model_with_dropout,
    read_metrics,
    read_summary,
    run_quietly,
    tiny_config,
)

from graftlm import cli
from graftlm.configuring import dump_yaml
from graftlm.errors import UserError
from graftlm.identity import SETTINGS, settings_of
from graftlm.methods.sparse_settings import ReweightingSettings
from graftlm.training import run_trainer
from graftlm.training.config import RunConfig
from graftlm.training.run import train_one
from graftlm.training.run_folder import check_same_config

# Two epochs of 6 steps, so that the middle stage lies in both.
KINDS = {
    "full": {"apex": {"operator_learning_rate": "auto", "rewarmup_ratio": 0.1}},
    "small": {"apex": {"trains": "small", "budget": 0.3, "activation_regularization": 0.01}},
    "half": {"apex": {"trains": "half", "budget": 0.7, "stage_by": "epochs", "stage_length": 0.6}},
    "split": {"apex": {"start": "split", "split_tolerance": 10.0}},
    "control": {"method": "full", "stage_starts": (0, 4, 8), "apex": {"stage_learning_rates": (1e-3, 5e-4, 1e-4)}},
}


def make_config(folder: Path, kind: str, model: str) -> RunConfig:
    return tiny_config(folder, model=model, save_steps=2, max_steps=-1, num_train_epochs=2, **KINDS[kind])


def start(config: RunConfig, **kwargs) -> int | None:
    """Exit code of a run in a process of its own."""
    return exit_code(run_quietly, config, **kwargs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dropping):
    return left_alone(tmp_path_factory, run_quietly, partial(make_config, model=dropping))


@pytest.mark.parametrize("kind", ["full", "small", "control"])
def test_killed_twice_and_resumed(kind, whole, dropping, tmp_path):
    reference, moments = whole(kind)
    config = make_config(tmp_path, kind, dropping)
    for share in (0.4, 0.3):
        assert start(config, kill_at=round(share * moments), resume=share < 0.4) == -signal.SIGKILL
    assert start(config, resume=True) == 0
    assert_same_run(tmp_path / "run", reference)


def test_killed_between_a_stage_and_its_checkpoint(whole, dropping, tmp_path):
    reference, _ = whole("full")
    config = make_config(tmp_path, "full", dropping)
    assert start(config, kill_at="step-4") == -signal.SIGKILL
    checkpoints = tmp_path / "run" / "checkpoints"
    complete, begun = sorted(p.name for p in checkpoints.iterdir())[::-1]
    assert complete == "step-2"
    assert begun.startswith(".step-4.")
    assert any(line.get("when") == "after_fusion" for line in read_metrics(tmp_path / "run"))
    assert start(config, resume=True) == 0
    assert_same_run(tmp_path / "run", reference)


def test_killed_after_the_last_step(whole, dropping, tmp_path):
    """The last checkpoint has nothing left to train: not one step is taken again."""
    reference, _ = whole("full")
    config = make_config(tmp_path, "full", dropping)
    assert start(config, kill_at="summary.json") == -signal.SIGKILL
    assert start(config, resume=True) == 0
    assert_same_run(tmp_path / "run", reference)


def test_interrupted_run_says_how_to_go_on_and_does(whole, dropping, tmp_path, monkeypatch, capsys):
    reference, _ = whole("control")
    config = make_config(tmp_path, "control", dropping)
    (tmp_path / "c.yaml").write_text(dump_yaml(config))

    class Interrupted(run_trainer.RunTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 7:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("graftlm.training.run.RunTrainer", Interrupted)
        assert cli.main(["train", str(tmp_path / "c.yaml")]) == 130
    hint = capsys.readouterr().err.splitlines()[-1]
    assert hint == f"graftlm: interrupted; go on with: graftlm train {tmp_path}/run/config.yaml --resume"
    train_one(config, resume=True)
    assert_same_run(tmp_path / "run", reference)


def test_changed_settings_are_refused(whole, tmp_path, capsys):
    reference, _ = whole("full")
    before = files_of(reference)
    words = ["train", str(reference / "config.yaml"), "--resume", "learning_rate=1e-4"]
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert "learning_rate was 0.001 and is now 0.0001" in shown
    assert shown.count("\n") == 1
    assert files_of(reference) == before


def test_what_lies_elsewhere_is_the_same(whole, dropping, tmp_path, monkeypatch):
    """Files that were moved, or copied, and settings that change no weight, do not keep a run from going on."""
    reference, _ = whole("full")
    config = make_config(tmp_path, "full", dropping)

    class Interrupted(run_trainer.RunTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("graftlm.training.run.RunTrainer", Interrupted)
        train_one(config)
    moved = Path(config.data[0].path).rename(tmp_path / "moved.jsonl")
    copied = shutil.copytree(dropping, tmp_path / "copied")
    sources = (dataclasses.replace(config.data[0], path=str(moved)),)
    changes = {"data": sources, "model": str(copied), "save_steps": 5, "cache_dir": str(tmp_path / "new_cache")}
    train_one(dataclasses.replace(config, **changes), resume=True)
    assert read_metrics(tmp_path / "run") == read_metrics(reference)


def test_other_files_are_refused(tmp_path):
    config = tiny_config(tmp_path, model=model_with_dropout(tmp_path / "model"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_yaml(config))
    other, path = tmp_path / "other", Path(config.data[0].path)
    shutil.copytree(config.model, other)

    def given(path, **changes):
        return dataclasses.replace(config, data=(dataclasses.replace(config.data[0], path=str(path), **changes),))

    same = shutil.copy(path, tmp_path / "same.jsonl")
    check_same_config(given(same), run)
    check_same_config(dataclasses.replace(config, model=str(other)), run)
    (other / "model.safetensors").write_bytes(b"other")
    text = shutil.copy(path, tmp_path / "same.txt")  # the same bytes, read as one document
    (tmp_path / "less.jsonl").write_text('{"text": "less"}')
    others = [given(text), given(tmp_path / "less.jsonl"), given(same, weight=2.0)]
    for changed in (*others, dataclasses.replace(config, model=str(other))):
        with pytest.raises(UserError, match="a resumed run keeps its settings"):
            check_same_config(changed, run)
    # Of a comparison's run, what was there is known after it has gone.
    (run / SETTINGS).write_text(json.dumps(settings_of(config)))
    Path(config.model).rename(tmp_path / "gone")
    check_same_config(dataclasses.replace(config, model=str(tmp_path / "gone")), run)
    with pytest.raises(UserError, match="a resumed run keeps its settings"):
        check_same_config(dataclasses.replace(config, model=str(other)), run)


def test_resume_without_a_checkpoint_starts_from_the_beginning(whole, dropping, tmp_path, capsys):
    reference, _ = whole("full")
    config = make_config(tmp_path, "full", dropping)
    assert start(config, kill_at="step-2") == -signal.SIGKILL
    assert start(config, resume=True) == 0
    assert_same_run(tmp_path / "run", reference)


# --- slow: many moments, and the command line ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("share", [(i + 0.5) / 12 for i in range(12)])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere(kind, share, whole, dropping, tmp_path):
    reference, moments = whole(kind)
    config = make_config(tmp_path, kind, dropping)
    assert start(config, kill_at=round(share * moments)) == -signal.SIGKILL
    assert start(config, resume=True) == 0
    assert_same_run(tmp_path / "run", reference)


def command(config_file: Path, *words: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "graftlm", "train", str(config_file), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
    )


def wait_for_step(metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"{metrics} never came to step {step}")


@pytest.fixture
def with_control(tmp_path, dropping):
    """A config file of a run with a control."""
    config = tiny_config(tmp_path, model=dropping, save_steps=2, max_steps=-1, num_train_epochs=2, control=True)
    file = tmp_path / "c.yaml"
    file.write_text(dump_yaml(config))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 7])
def test_command_killed_and_resumed(step, with_control, tmp_path, tmp_path_factory, dropping):
    other = tmp_path_factory.mktemp("whole")
    config = tiny_config(other, model=dropping, save_steps=2, max_steps=-1, num_train_epochs=2)
    assert start(config) == 0
    process = command(with_control, "control=false")
    wait_for_step(tmp_path / "run/metrics.jsonl", step)
    process.kill()
    process.communicate()
    resumed = command(with_control, "control=false", "--resume")
    assert resumed.wait() == 0, resumed.stdout.read()
    ours = tmp_path / "run"
    assert read_metrics(ours) == read_metrics(other / "run")
    assert read_summary(ours) == read_summary(other / "run")
    name = "model/model.safetensors"
    assert (ours / name).read_bytes() == (other / "run" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["control", "run"])
def test_killed_while_the_control_runs(victim, with_control, tmp_path, tmp_path_factory):
    """A control that is killed is gone on with; and when the run above it is killed, it does not stay behind."""
    process = command(with_control)
    control = tmp_path / "run/control"
    wait_for_step(control / "metrics.jsonl", 3)
    [child] = psutil.Process(process.pid).children()
    (child if victim == "control" else process).kill()
    assert process.wait() == (2 if victim == "control" else -signal.SIGKILL)
    child.wait(timeout=30)
    assert (tmp_path / "run/model/model.safetensors").exists()
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    resumed = command(with_control, "--resume")
    assert resumed.wait() == 0, resumed.stdout.read()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before  # only the control was run again
    steps = [line["step"] for line in read_metrics(control) if line["event"] == "train"]
    assert steps == list(range(1, 13))
    alone = control_of(tmp_path, tmp_path_factory.mktemp("alone"))
    assert start(alone) == 0
    assert_same_run(control, Path(alone.output_dir))


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, True),
        ({"reweighting": ReweightingSettings(strategy="linupper")}, False),
        ({"apex": {"assess_per": "microbatch"}}, False),
    ],
)
def test_a_step_may_be_divided_otherwise_only_where_that_changes_nothing(changes, free, tmp_path):
    """Sample weights, and the authors' assessment, are of one micro-batch."""
    config = tiny_config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=1, **changes)
    run = Path(config.output_dir)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_yaml(config))
    divided = dataclasses.replace(config, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    with contextlib.nullcontext() if free else pytest.raises(UserError, match="per_device_train_batch_size was 4"):
        check_same_config(divided, run)
