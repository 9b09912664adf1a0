"""One run in processes of its own: its peak memory is its own, and its failure nobody else's."""

import collections
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.comparing.results import Record, record_of
from graftlm.comparing.tasks import Tasks
from graftlm.configuring import dump_yaml
from graftlm.errors import UserError
from graftlm.files import read_json, remove_folder, write_json, write_text
from graftlm.identity import SETTINGS, same_settings
from graftlm.reporting.rundata import read_run
from graftlm.training.child import start_training
from graftlm.training.config import RunConfig

BIG = ("model", "checkpoints", "activations.safetensors")
"""What of a run folder is deleted when its figures are kept elsewhere."""
TIMER = "wall.json"
"""Of a run folder: seconds of its processes so far."""
STREAMS: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
TAIL = 20
"""Last lines of a process that are looked through for its error."""


class RunFailed(Exception):
    """A run or its evaluation ended with an error; the text says which."""


class OutOfTime(Exception):
    """The given time was up; what was trained until the last checkpoint stays."""


def run_record(
    config: RunConfig,
    settings: Mapping[str, Any],
    *,
    tasks: Tasks | None = None,
    seconds_left: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Record:
    """Train `config` in its output_dir, go on there, or take it as finished; evaluate it; return what is kept of it.

    tasks: None evaluates nothing. seconds_left: after these the process is interrupted. say: gets every line that the
    processes write to stderr.

    Raises RunFailed, OutOfTime, and UserError for a folder that cannot be written.
    """
    folder = Path(config.output_dir)
    finished, timer = folder / "summary.json", folder / TIMER
    if finished.exists() and tasks is not None and not (folder / "model").exists():
        shutil.rmtree(folder)  # to be evaluated on other tasks, after its model was deleted
    open_folder_of(settings, folder)
    before = seconds_spent(folder)
    began = time.monotonic()
    log = folder / "log.txt"

    def left() -> float | None:
        return None if seconds_left is None else seconds_left - (time.monotonic() - began)

    try:
        if not finished.exists():
            _train(config, log, left(), say)
        results = _evaluate(folder, tasks, log, left(), say) if tasks is not None else {}
    finally:
        wall = before + time.monotonic() - began
        write_json(timer, {"seconds": wall})
    return record_of(read_run(folder), settings, wall_seconds=wall, tasks=results)


def open_folder_of(settings: Mapping[str, Any], folder: Path) -> None:
    """Make the folder of a run with these settings, or go on in it; one that says that it is of others is emptied: a
    default has changed since, so that the name is the same and the run another."""
    told = folder / SETTINGS
    if told.exists() and not same_settings(read_json(told), settings):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(told, settings)


def seconds_spent(folder: Path) -> float:
    """What an unfinished run has taken so far, where it goes on from a checkpoint rather than from the start."""
    return _timed(folder) if _goes_on(folder) else 0.0


def seconds_lost(folder: Path) -> float:
    """What an interrupted run had taken that left nothing to go on from: so long is too short for it."""
    return 0.0 if _goes_on(folder) else _timed(folder)


def _goes_on(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("checkpoints", "summary.json"))


def _timed(folder: Path) -> float:
    timer = folder / TIMER
    return float(read_json(timer)["seconds"]) if timer.exists() else 0.0


def discard(folder: Path) -> None:
    """Delete what is big in the folder of a run whose record is kept."""
    for name in BIG:
        path = folder / name
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)


def _train(config: RunConfig, log: Path, seconds: float | None, say: Callable[[str], None]) -> None:
    folder = Path(config.output_dir)
    given = folder / "given.yaml"
    write_text(given, dump_yaml(config))
    resume = (folder / "checkpoints").exists()
    watch(start_training(given, resume=resume, lean=True, **STREAMS), log, seconds, say)
    given.unlink(missing_ok=True)


def _evaluate(
    folder: Path, tasks: Tasks, log: Path, seconds: float | None, say: Callable[[str], None]
) -> dict[str, Any]:
    report = evaluate(str(folder / "model"), folder / "tasks.json", tasks.options(), log, seconds, say)
    return {
        "asked": list(tasks.asked),
        "limit": tasks.limit,
        "dtype": tasks.dtype,
        "results": report["results"],
        "data": report.get("data", {}),
    }


def evaluate(
    model: str,
    out: Path,
    options: Sequence[str],
    log: Path,
    seconds: float | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """`graftlm eval model` with the words `options`, in a process that ends with this one: what it wrote to `out`."""
    command = [sys.executable, "-m", "graftlm.comparing.evaluating", "eval", model, *options, "--out", str(out)]
    watch(subprocess.Popen(command, stdin=subprocess.PIPE, **STREAMS), log, seconds, say)
    report: dict[str, Any] = read_json(out)
    return report


def watch(process: "subprocess.Popen[bytes]", log: Path, seconds: float | None, say: Callable[[str], None]) -> None:
    """Wait for a process, its stderr going to `log` and `say`; interrupt it when the seconds are over."""
    tail: collections.deque[str] = collections.deque(maxlen=TAIL)
    late = threading.Event()

    def interrupt() -> None:
        late.set()
        process.terminate()  # not SIGINT, which is ignored by what a script has put in the background

    timer = threading.Timer(max(0.0, seconds), interrupt) if seconds is not None else None
    with process, log.open("ab") as file:
        if timer is not None:
            timer.start()
        try:
            assert process.stderr is not None
            for line in process.stderr:
                file.write(line)
                text = line.decode("utf-8", "replace").strip()
                if text:
                    tail.append(text)
                    say(text)
            status = process.wait()
        except BaseException:
            process.terminate()
            raise
        finally:
            if timer is not None:
                timer.cancel()
    if status != 0 and late.is_set():
        raise OutOfTime
    if status != 0:
        raise RunFailed(f"{reason(tail) or f'exit code {status}'} (all of it in {log})")


def reason(lines: Sequence[str]) -> str:
    """The error among the last lines of a process: the one that graftlm prints, else the last."""
    said = [line.removeprefix("graftlm: ") for line in lines if line.startswith("graftlm: ")]
    return said[-1] if said else lines[-1] if lines else ""


def check_writable(folder: Path) -> None:
    """Raise UserError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); give another output_dir") from error
