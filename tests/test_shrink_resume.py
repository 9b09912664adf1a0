"""Killed with -9 at any moment and started again, a shrink ends with the same bits as one that was left alone."""

import dataclasses
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from own_process import exit_code, left_alone
from tiny_shrinks import assert_same_shrink, quiet_shrink, shrink_quietly, tiny_shrink

from graftlm.errors import UserError

KINDS = {
    "moments": {"keep_moments": True, "train": {"save_steps": 1}},
    "apex": {"recovery": "apex", "shares": "equal", "train": {"save_steps": 3}},
    "everything": {"keep": "all", "schedule": "linear", "prune": {"method": "llm-pruner"}},
}


def make_shrink(folder: Path, kind: str, model: str):
    return tiny_shrink(folder, model=model, **KINDS[kind])


def start(task, **kwargs) -> int | None:
    """Exit code of a shrink in a process of its own."""
    return exit_code(shrink_quietly, task, **kwargs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dropping):
    return left_alone(tmp_path_factory, shrink_quietly, partial(make_shrink, model=dropping))


@pytest.mark.parametrize("kind", ["moments", "apex"])
def test_killed_twice(kind, whole, dropping, tmp_path):
    reference, moments = whole(kind)
    task = make_shrink(tmp_path, kind, dropping)
    for share in (0.4, 0.35):
        assert start(task, kill_at=round(share * moments)) == -signal.SIGKILL
    assert start(task) == 0
    assert_same_shrink(tmp_path / "run", reference)


@pytest.mark.parametrize(
    "name",
    [
        "phase_02/pruned",
        "phase_02/train/checkpoints/step-2",  # which the phase begins with
        pytest.param("phase_02/train/checkpoints/step-6", marks=pytest.mark.slow),
        pytest.param("phase_02/train/model", marks=pytest.mark.slow),
        pytest.param("run/model", marks=pytest.mark.slow),
        pytest.param("run/summary.json", marks=pytest.mark.slow),
    ],
)
def test_killed_before_something_gets_its_name(name, whole, dropping, tmp_path):
    reference, _ = whole("moments")
    task = make_shrink(tmp_path, "moments", dropping)
    assert start(task, kill_at=name) == -signal.SIGKILL
    assert start(task) == 0
    assert_same_shrink(tmp_path / "run", reference)


def test_what_a_kill_has_left_in_a_finished_phase_goes(whole, dropping, tmp_path):
    """Its data.json is written once more when the next phase begins."""
    reference, _ = whole("moments")
    task = make_shrink(tmp_path, "moments", dropping)
    assert start(task, kill_at="phase_02/pruned") == -signal.SIGKILL
    (tmp_path / "run/phase_01/train/.data.json.unfinished-1").write_text("{")
    assert start(task) == 0
    assert_same_shrink(tmp_path / "run", reference)


def test_finished_shrink_is_left_alone(whole, dropping, tmp_path):
    reference, _ = whole("moments")
    task = make_shrink(reference.parent, "moments", dropping)
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    summary = quiet_shrink(task)
    assert summary["parameters"] <= 160_000
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*")} == before


def test_other_settings_are_refused(whole, dropping):
    reference, _ = whole("moments")
    task = tiny_shrink(reference.parent, model=dropping, **{**KINDS["moments"], "shares": "equal"})
    with pytest.raises(UserError, match="shares was 'growing' and is now 'equal'"):
        quiet_shrink(task)
    task = make_shrink(reference.parent, "moments", dropping)
    other = dataclasses.replace(task, run=dataclasses.replace(task.run, learning_rate=1.0))
    with pytest.raises(UserError, match=r"train\.learning_rate was 0\.001 and is now 1\.0"):
        quiet_shrink(other)


def test_a_schedule_of_the_shrink_s_own_that_is_left_out_is_refused(dropping, tmp_path):
    """A mapping's keys stand in one of the two files alone."""
    own = tiny_shrink(tmp_path, model=dropping, train={"lr_scheduler_kwargs": {"min_lr_ratio": 0.5}})
    assert start(own, kill_at="phase_02/pruned") == -signal.SIGKILL
    with pytest.raises(UserError, match=r"train\.lr_scheduler_kwargs"):
        quiet_shrink(tiny_shrink(tmp_path, model=dropping))


def test_changed_data_is_refused(whole, dropping, tmp_path):
    task = make_shrink(tmp_path, "moments", dropping)
    assert start(task, kill_at="phase_01/train/summary.json") == -signal.SIGKILL
    data = tmp_path / "text.jsonl"
    data.write_text(data.read_text() + data.read_text())
    with pytest.raises(UserError, match=r"the data .* has changed"):
        quiet_shrink(task)


def test_data_changed_between_phases_prune_nothing(whole, dropping, tmp_path):
    """What pruning is calibrated on is part of the data, too."""
    reference, _ = whole("moments")
    task = make_shrink(tmp_path, "moments", dropping)
    assert start(task, kill_at="phase_02/pruned") == -signal.SIGKILL
    data = tmp_path / "text.jsonl"
    shutil.copy2(data, tmp_path / "kept")
    data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match=r"the data .* has changed"):
        quiet_shrink(task)
    assert not (tmp_path / "run/phase_02/pruned").exists()
    shutil.copy2(tmp_path / "kept", data)
    quiet_shrink(task)
    assert_same_shrink(reference, tmp_path / "run")


# --- slow ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("share", [(i + 0.5) / 16 for i in range(16)])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere(kind, share, whole, dropping, tmp_path):
    reference, moments = whole(kind)
    task = make_shrink(tmp_path, kind, dropping)
    assert start(task, kill_at=round(share * moments)) == -signal.SIGKILL
    assert start(task) == 0
    assert_same_shrink(tmp_path / "run", reference)
