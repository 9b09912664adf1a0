"""Running a comparison: reuse, failures, time that is up, processes, and kills."""

import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_prune_comparisons
from rich.console import Console
from tiny_comparisons import by_name, loss_of, made_up, opened, write_comparison
from tiny_runs import read_metrics, read_summary

from graftlm import cli
from graftlm.comparing import loop, process, runner
from graftlm.comparing.loop import alone
from graftlm.comparing.process import OutOfTime, RunFailed, run_record, watch
from graftlm.comparing.pruning import runner as prune_runner
from graftlm.comparing.runner import compare
from graftlm.comparing.summary import summarise
from graftlm.comparing.tasks import Tasks
from graftlm.environment import describe_environment
from graftlm.errors import UserError
from graftlm.training.run import train_one


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells are trained here, which saves each a start of Python. Returns the folders in the order of training."""
    trained = []

    def train(config, log, seconds, say):
        trained.append(Path(config.output_dir).name)
        train_one(config, resume=False)

    monkeypatch.setattr(process, "_train", train)
    return trained


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_whole_comparison(in_this_process, tmp_path, monkeypatch):
    variants = {"apex": {"method": "apex", "learning_rates": [1e-3, 3e-3]}}
    path = write_comparison(tmp_path, seeds=[0], plain_multiples=[1], variants=variants)
    summary = compare(path, console=quiet())
    assert [name.split("-")[0] for name in in_this_process] == ["control", "apex", "apex"]
    record = next(iter(json.loads((tmp_path / "out/results.json").read_text())["cells"].values()))
    assert record["eval_loss_end"] < record["eval_loss_start"]
    assert record["selection_loss"] != record["eval_loss_end"]
    assert record["curve"]["loss"][-1] == pytest.approx(record["eval_loss_end"], abs=1e-6)
    assert len(record["training_curve"]["loss"]) == record["steps"]
    assert record["peak_memory_bytes"] > 50e6 and record["environment"]["packages"]["torch"]
    control, apex = summary["arms"]
    assert control["loss_start"] == apex["loss_start"]
    assert apex["difference"]["mean"] == apex["loss"]["mean"] - control["loss"]["mean"] != 0
    left = {path.name for path in (tmp_path / "out" / "cells").glob("*/*")}
    assert not left & {"model", "checkpoints", "activations.safetensors"}
    # Once more, with the run folders gone: nothing is trained.
    (tmp_path / "out" / "cells").rename(tmp_path / "gone")
    assert compare(path, console=quiet())["arms"] == summary["arms"]
    assert len(in_this_process) == 3


def test_a_failed_cell_does_not_stop_the_others(monkeypatch, tmp_path):
    def run(config, settings, **kwargs):
        if config.method == "apex" and config.seed == 0:
            raise RunFailed("the loss is NaN")
        cell = next(cell for cell in opened(path)[1].wanted() if cell.settings == settings)
        return made_up(cell, loss_of(cell))

    monkeypatch.setattr(runner, "run_record", run)
    path = write_comparison(tmp_path, plain_multiples=[1])
    with pytest.raises(UserError, match=r"1 of the comparison's runs failed: apex, seed 0.*: the loss is NaN"):
        compare(path, console=quiet())
    summary = json.loads((tmp_path / "out/comparison.json").read_text())
    assert len(by_name(summary, "apex")["loss"]["by_seed"]) == 2
    assert summary["failed"] and "the loss is NaN" in (tmp_path / "out/report.html").read_text()
    assert cli.main(["compare", str(path)]) == 2


def test_minutes(monkeypatch, tmp_path):
    """Runs of a minute each: two fit into two and a half."""
    now = [0.0]

    def run(config, settings, seconds_left, **kwargs):
        assert seconds_left == pytest.approx(150 - now[0])
        now[0] += 60
        cell = next(cell for cell in opened(path)[1].wanted() if cell.settings == settings)
        return made_up(cell, 3.0, wall_seconds=60.0, environment=describe_environment())

    monkeypatch.setattr(runner, "run_record", run)
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    path = write_comparison(tmp_path, plain_multiples=[1])
    console = quiet()
    compare(path, minutes=2.5, console=console)
    assert now[0] == 120
    assert "the time is up" in console.file.getvalue()
    assert "left to run: 4, control, seed 1" in console.file.getvalue()
    assert by_name(json.loads((tmp_path / "out/comparison.json").read_text()), "apex")["difference"]["n"] == 1


def test_an_unfinished_run_needs_only_its_rest(monkeypatch, tmp_path):
    """With calls shorter than a run, one that was interrupted must be gone on with."""
    path = write_comparison(tmp_path, plain_multiples=[1])
    _, cells = opened(path)
    first, begun = cells.open()[:2]
    cells.results.put(first.key, made_up(first, 3.0, wall_seconds=60.0, environment=describe_environment()))
    started = []
    monkeypatch.setattr(runner, "run_record", lambda config, *_, **__: started.append(config.output_dir) or stop())

    def stop():
        raise OutOfTime

    console = quiet()
    compare(path, minutes=0.5, console=console)
    assert not started
    assert "of 0.5 min 30.0 s are left, and the shortest run takes about 1 min 00 s" in console.file.getvalue()
    (cells.run_folder(begun) / "checkpoints").mkdir(parents=True)
    (cells.run_folder(begun) / "wall.json").write_text('{"seconds": 40}')
    compare(path, minutes=0.5, console=quiet())
    assert started == [str(cells.run_folder(begun))]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ["arc_eassy"]}, "arc_eassy: no such task .*nearest: arc_easy"),
        ({"tasks": ["arc_easy"], "task_data_dir": "."}, "arc_easy: no data: looked for arc_easy/test.jsonl"),
        ({"tasks": ["arc_easy"], "task_data_dir": "nowhere"}, "task_data_dir: nowhere: no such folder"),
        ({"tasks": ["humaneval"]}, "humaneval: runs programs that the model wrote.*allow_code_execution: true"),
    ],
)
def test_tasks_are_checked_before_anything_is_trained(changes, said, in_this_process, tmp_path, monkeypatch):
    path = write_comparison(tmp_path, **changes)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        compare(path, console=quiet())
    assert not in_this_process and not (tmp_path / "out").exists()


def test_data_that_changes_meanwhile_ends_it(monkeypatch, tmp_path):
    path = write_comparison(tmp_path)

    def run(config, settings, **kwargs):
        cell = next(cell for cell in opened(path)[1].wanted() if cell.settings == settings)
        (tmp_path / "text.jsonl").write_text('{"text": "other"}')
        return made_up(cell, 3.0)

    monkeypatch.setattr(runner, "run_record", run)
    with pytest.raises(UserError, match="data: its files have changed since the comparison began"):
        compare(path, console=quiet())
    assert len(json.loads((tmp_path / "out/results.json").read_text())["cells"]) == 1


@pytest.mark.parametrize(
    ("results", "said"),
    [(".", r"results: \. is a folder; name a file in it"), ("text.jsonl/x.json", "cannot write .*text.jsonl/x.json")],
)
@pytest.mark.parametrize("pruning", [False, True])
def test_results_that_cannot_be_written_are_said_first(results, said, pruning, tmp_path, monkeypatch):
    path = write_comparison(tmp_path, results=results)
    if pruning:
        path = tiny_prune_comparisons.write_comparison(tmp_path, results=results)
    monkeypatch.chdir(tmp_path)
    for module in (runner, prune_runner):
        monkeypatch.setattr(module, "run_open", lambda *given: pytest.fail("a run was started"), raising=False)
    monkeypatch.setattr(runner, "run_cells", lambda *given: pytest.fail("a run was started"))
    with pytest.raises(UserError, match=said) as caught:
        compare(path, console=quiet())
    assert "\n" not in str(caught.value)


def test_dry_run_writes_nothing(tmp_path):
    console = quiet()
    compare(write_comparison(tmp_path), dry_run=True, console=console)
    assert "12 to run, time unknown\n" in console.file.getvalue()
    assert not (tmp_path / "out").exists()


def test_a_plan_says_what_is_known(tmp_path):
    path = write_comparison(tmp_path, learning_rates=[1e-3, 2e-3], selection_seeds=[0], plain_multiples=[1])
    _, cells = opened(path)
    first = cells.open()[0]
    here = {"environment": describe_environment(), "wall_seconds": 30.0}
    cells.results.put(first.key, made_up(first, 3.0, **here))
    console = quiet()
    compare(path, dry_run=True, console=console)
    assert "3 to run now, about 1 min 30 s; 4 more once learning rates are chosen" in console.file.getvalue()


def test_two_at_once_are_refused(tmp_path):
    refused = pytest.raises(UserError, match="another comparison is running there")
    with alone(tmp_path), refused, alone(tmp_path):
        pass


# --- processes


def start(code: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)


def test_a_process_that_fails_says_why(tmp_path):
    lines = []
    code = "import sys; print('working', file=sys.stderr); print('graftlm: no such file', file=sys.stderr); sys.exit(2)"
    with pytest.raises(RunFailed, match=r"^no such file"):
        watch(start(code), tmp_path / "log", None, lines.append)
    assert lines == ["working", "graftlm: no such file"]
    assert (tmp_path / "log").read_text().splitlines() == lines
    with pytest.raises(RunFailed, match=r"^exit code 3"):
        watch(start("raise SystemExit(3)"), tmp_path / "log", None, lines.append)


def test_a_process_is_interrupted_when_the_time_is_up(tmp_path):
    before = time.monotonic()
    # As under a script's `graftlm compare ... &`, where SIGINT is ignored.
    code = (
        "import signal, time, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "print('going', file=sys.stderr, flush=True); time.sleep(60)"
    )
    with pytest.raises(OutOfTime):
        watch(start(code), tmp_path / "log", 0.5, lambda line: None)
    assert time.monotonic() - before < 30


def test_tasks_go_through_graftlm_eval(in_this_process, monkeypatch, tmp_path):
    asked = []

    real = subprocess.Popen

    def popen(command, **streams):
        if "--tasks" not in command:
            return real(command, **streams)
        asked.append(command)
        out = command[command.index("--out") + 1]
        result = {"results": {"arc_easy": {"acc": 0.25, "acc_stderr": 0.1, "n": 4}}}
        return real([sys.executable, "-c", f"open({out!r}, 'w').write({json.dumps(result)!r})"], **streams)

    _, cells = opened(write_comparison(tmp_path, tasks=["arc_easy"], task_limit=4, task_data_dir="D"))
    cell = cells.open()[0]
    config = dataclasses.replace(cell.config, output_dir=str(tmp_path / "run"))
    tasks = Tasks(
        ("arc_easy",),
        limit=4,
        data_dir="D",
        batch_size=8,
        dtype="bfloat16",
        allow_code_execution=True,
        trust_remote_code=True,
    )
    monkeypatch.setattr(process.subprocess, "Popen", popen)
    record = run_record(config, cell.settings, tasks=tasks)
    assert record["tasks"]["results"]["arc_easy"]["acc"] == 0.25
    cli.parse(asked[0][3:])  # what was called is a command line of graftlm
    words = asked[0][3:]
    assert words[:2] == ["eval", str(tmp_path / "run" / "model")]
    assert words[words.index("--tasks") + 1] == "arc_easy" and words[words.index("--limit") + 1] == "4"
    assert words[words.index("--data-dir") + 1] == "D" and words[words.index("--batch-size") + 1] == "8"
    assert words[words.index("--dtype") + 1] == "bfloat16" and "--allow-code-execution" in words
    assert cli.parse(words).trust_remote_code


def test_only_the_chosen_learning_rate_is_evaluated(in_this_process, monkeypatch, tmp_path):
    """Models wait until the choice is made; then the others go, and after its evaluation the chosen one too."""
    out = tmp_path / "out"
    evaluated = []

    def evaluate(model, *rest):
        evaluated.append(Path(model).parent.name)
        waiting.append(sorted(path.parent.name for path in out.glob("cells/*/model")))
        if fails:
            raise RunFailed("the harness broke")
        return {"results": {"arc_easy": {"acc": 0.25, "acc_stderr": 0.1, "n": 4, "shots": 0}}}

    waiting, fails = [], True
    monkeypatch.setattr(process, "evaluate", evaluate)
    monkeypatch.setattr(Tasks, "check", lambda tasks: None)
    changes = {"seeds": [0, 1], "selection_seeds": [0], "plain_multiples": [1, 2], "learning_rates": [1e-3, 3e-3]}
    path = write_comparison(tmp_path, tasks=["arc_easy"], variants={"apex": {"method": "apex"}}, **changes)
    with pytest.raises(UserError, match=r"4 of the comparison's runs failed.*the harness broke"):
        compare(path, console=quiet())
    # An evaluation that fails changes no choice.
    assert len(in_this_process) == 8 and len(set(evaluated)) == len(evaluated) == 4
    fails = False
    evaluated.clear(), waiting.clear()
    summary = compare(path, console=quiet())
    assert len(in_this_process) == 8  # what was trained is only evaluated now
    rates = {arm["name"]: arm["learning_rate"] for arm in summary["arms"]}
    wanted = [cell for cell in opened(path)[1].wanted() if cell.multiple == 1 and cell.learning_rate == rates[cell.arm]]
    assert sorted(evaluated) == sorted(cell.folder for cell in wanted) and len(wanted) == 4
    assert all(by_name(summary, name)["tasks"]["arc_easy"]["mean"] == 0.25 for name in rates)
    assert waiting == [sorted(evaluated[number:]) for number in range(4)]
    assert not list(out.glob("cells/*/model"))


def test_a_run_that_two_arms_share_is_evaluated_for_the_one_that_chose_it(tmp_path):
    """The same run under two names: a learning rate that the one rejects is the other's."""
    variants = {"tuned": {"method": "apex", "learning_rates": [1e-3, 3e-3]}, "given": {"method": "apex"}}
    given = {"base": {"learning_rate": 3e-3}, "tasks": ["arc_easy"], "seeds": [0], "plain_multiples": [1]}
    _, cells = opened(write_comparison(tmp_path, variants=variants, **given))
    scores = {"asked": ["arc_easy"], "limit": None, "results": {"arc_easy": {"acc": 0.5, "shots": 0}}, "data": {}}
    for _ in range(9):  # each is trained, then evaluated if that is asked for
        if todo := cells.open():
            better = 0.1 if todo[0].config.method == "apex" and todo[0].learning_rate == 1e-3 else 0.0
            found = scores if cells.trained(todo[0]) or cells.tasks(todo[0]) else {}
            cells.results.put(todo[0].key, made_up(todo[0], 3.0 - better, tasks=found))
    assert not cells.open()
    arms = {arm["name"]: arm for arm in summarise(cells.comparison, cells, {})["arms"]}
    assert arms["tuned"]["learning_rate"] == 1e-3 and arms["given"]["learning_rate"] == 3e-3
    assert all(arms[name]["tasks"]["arc_easy"]["mean"] == 0.5 for name in arms)
    assert all(cells.settled(cell) for cell in cells.wanted())


def test_a_folder_of_other_settings_is_no_finished_run(in_this_process, tmp_path):
    """As where a default has changed: the name of the folder has not."""
    _, cells = opened(write_comparison(tmp_path))
    cell = cells.open()[0]
    config = dataclasses.replace(cell.config, output_dir=str(tmp_path / "run"))
    first = run_record(config, cell.settings)
    assert run_record(config, cell.settings)["eval_loss_end"] == first["eval_loss_end"]
    assert len(in_this_process) == 1
    run_record(config, {**cell.settings, "adam_beta2": 0.5})
    assert len(in_this_process) == 2


def test_a_run_that_was_not_evaluated_is_said_at_once(monkeypatch, tmp_path):
    ran = []

    def record(config, settings, **given):
        ran.append(config.seed)
        return {"eval_loss_end": None}

    monkeypatch.setattr(runner, "run_record", record)
    with pytest.raises(UserError, match=r"control, seed 0, learning rate 0\.001: was not evaluated"):
        compare(write_comparison(tmp_path), console=quiet())
    assert len(ran) == 1


def test_an_evaluation_ends_with_the_comparison(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 50)
    out = tmp_path / "out.json"
    words = ["eval", "tiny-llama", "--perplexity", str(tmp_path / "a.txt"), "--out", str(out)]
    command = [sys.executable, "-m", "graftlm.comparing.evaluating", *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    process.stdin.close()  # as when the comparison is killed with -9
    assert process.wait(300) == 1 and not out.exists()


@pytest.mark.slow
def test_killed_anywhere_it_goes_on(tmp_path):
    """graftlm compare, killed with -9 while a cell trains: its process ends too, and the next call goes on from the
    checkpoint to the same losses as without the kill."""
    base = {"max_steps": 40, "save_steps": 4}
    path = write_comparison(tmp_path, seeds=[0], plain_multiples=[1], base=base)
    command = [sys.executable, "-m", "graftlm", "compare", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "out/cells").glob("apex*/checkpoints/step-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(json.loads((tmp_path / "out/results.json").read_text())["cells"]) == 1
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = tmp_path / "whole"
    subprocess.run([*command, f"output_dir={whole}"], check=True, stdout=subprocess.DEVNULL)
    ours, theirs = (json.loads((folder / "comparison.json").read_text()) for folder in (tmp_path / "out", whole))
    assert [arm["loss"] for arm in ours["arms"]] == [arm["loss"] for arm in theirs["arms"]]
    assert math.isfinite(by_name(ours, "apex")["difference"]["mean"])
    mine, other = (next(folder.glob("cells/apex*")) for folder in (tmp_path / "out", whole))
    assert read_metrics(mine) == read_metrics(other)
    assert read_summary(mine).keys() == read_summary(other).keys()
