"""Runs what a comparison of ways of pruning still needs; what is finished is never run again."""

import dataclasses
import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from graftlm.comparing.loop import Say, alone, close, print_plan, run_open
from graftlm.comparing.process import STREAMS, check_writable, discard, evaluate, open_folder_of, watch
from graftlm.comparing.pruning.cells import Guesses, PruneCell, PruneCells
from graftlm.comparing.pruning.config import PruneCompareConfig, load_prune_comparison
from graftlm.comparing.pruning.jobs import DONE, MODEL
from graftlm.comparing.pruning.report import write_outputs
from graftlm.comparing.pruning.summary import summarise
from graftlm.comparing.pruning.tables import perplexity, tables
from graftlm.comparing.results import Record, Results
from graftlm.comparing.tables import show_tables
from graftlm.comparing.tasks import Tasks
from graftlm.environment import describe_environment
from graftlm.errors import UserError
from graftlm.files import check_file, read_json, write_json, write_text
from graftlm.reporting import figures


def compare_pruning(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    minutes: float | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what the comparison in `path` still needs, and write its tables and report; returns comparison.json.

    minutes: start no cell that would not fit, and interrupt one that does not end in time. dry_run: only say what would
    be run. Raises UserError for a config that is not allowed and, after everything else, for cells that failed.
    """
    console = console or Console()
    comparison = load_prune_comparison(path, overrides)
    settings = comparison.settings
    for text in settings.perplexity:
        if not Path(text).expanduser().is_file():
            raise UserError(f"perplexity: {text}: no such file; name a held-out text")
    results = Results(comparison.results_path)
    failed: dict[str, str] = {}
    cells = PruneCells(comparison, results, failed.__contains__)
    if dry_run:
        _print_plan(cells, console)
        return summarise(comparison, cells, failed)
    if settings.tasks and cells.open():
        Tasks.of(settings).check()
    check_writable(comparison.folder)
    check_file(comparison.results_path)  # now rather than when the first run is to be kept
    with alone(comparison.folder):
        for cell in () if settings.keep else cells.wanted():  # what a kill has left
            if cells.record(cell) is not None:
                discard(cells.run_folder(cell))
        run_open(
            cells.open,
            lambda: Guesses(results).still,
            lambda cell, left, say: _run(cells, cell, left, say),
            failed,
            minutes,
            console,
        )
        summary = summarise(comparison, cells, failed)
        written = write_outputs(comparison.folder, summary)
    show_tables(tables(summary), [*summary["notes"], *(f"failed: {text}" for text in summary["failed"])], console)
    close(written, cells.open(), failed, comparison.folder, console)
    return summary


def _run(cells: PruneCells, cell: PruneCell, left: float | None, say: Say) -> str:
    """Run a cell, keep its record, and say what came out."""
    if not cells.unchanged():
        raise UserError(
            "the model, the data or the texts have changed since the comparison began; put them back, or start again "
            "(finished cells on the old ones are then not used)"
        )
    settings = cells.comparison.settings
    folder = cells.run_folder(cell)
    record = run_cell(cell, settings, folder, left, say)
    cells.results.put(cell.key, record)
    if not settings.keep:
        discard(folder)
    first = record["perplexity"][Path(settings.perplexity[0]).name]["word_perplexity"]
    return f"word perplexity {perplexity(first)} in {figures.duration(record['wall_seconds'])}"


def run_cell(
    cell: PruneCell, settings: PruneCompareConfig, folder: Path, seconds_left: float | None, say: Say
) -> Record:
    """Prune, save and measure in processes of their own; goes on where a killed one left something finished.

    Raises RunFailed, OutOfTime.
    """
    began, log = time.monotonic(), folder / "log.txt"

    def left() -> float | None:
        return None if seconds_left is None else seconds_left - (time.monotonic() - began)

    open_folder_of(cell.settings, folder)
    if cell.job and not ((folder / DONE).exists() and (folder / MODEL).exists()):
        given = folder / "given.json"
        data = [dataclasses.asdict(source) for source in settings.data]
        write_json(given, {**cell.job.given(), "model": settings.model, "data": data, "dtype": settings.dtype})
        _work(given, log, left(), say)
    pruned = read_json(folder / DONE) if cell.job else {}
    model = str(folder / MODEL) if cell.job else settings.model
    texts = {
        Path(text).name: measured_text(Path(text), settings.perplexity_words, folder) for text in settings.perplexity
    }
    options = [word for text in texts.values() for word in ("--perplexity", str(text))]
    options += ["--dtype", settings.dtype]
    options += ["--max-length", str(settings.max_length)] if settings.max_length is not None else []
    # A limit would also cut texts, of which it counts the documents: these are one each.
    report = evaluate(model, folder / "eval.json", [*options, *Tasks.of(settings).options()], log, left(), say)
    found = report["results"]
    return {
        "settings": cell.settings,
        "method": cell.method,
        "environment": describe_environment(),  # the original's; that of pruning is in `pruned`
        **pruned,
        "perplexity": {name: found[f"perplexity:{text}"] for name, text in texts.items()},
        "tasks": {
            "asked": list(settings.tasks),
            "limit": settings.task_limit,
            "results": _of_tasks(found),
            "data": _of_tasks(report.get("data", {})),
        },
        "wall_seconds": round(time.monotonic() - began, 1),
    }


def _of_tasks(values: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation says of tasks, and not of texts."""
    return {name: one for name, one in values.items() if not name.startswith("perplexity:")}


def _work(given: Path, log: Path, seconds: float | None, say: Say) -> None:
    command = [sys.executable, "-m", "graftlm.comparing.pruning.work", str(given)]
    watch(subprocess.Popen(command, stdin=subprocess.PIPE, **STREAMS), log, seconds, say)


def measured_text(path: Path, words: int | None, folder: Path) -> Path:
    """The text that perplexity is measured on: `path`, or a file in `folder` with its first `words` words and the white
    space between them."""
    path = path.expanduser()
    if words is None:
        return path
    if path.suffix != ".txt":
        raise UserError(f"perplexity_words: {path} is no .txt file, and only those are cut; leave it out")
    kept: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            there = len(line.split())
            if there > words:
                kept.append(" ".join(line.split()[:words]))
                break
            kept.append(line)
            words -= there
    cut = folder / path.name
    write_text(cut, "".join(kept))
    return cut


def _print_plan(cells: PruneCells, console: Console) -> None:
    guesses = Guesses(cells.results)
    rows = []
    for _, same in itertools.groupby(cells.wanted(), key=lambda cell: cell.key):
        cell = next(same)
        record = cells.record(cell)
        rows.append((cell.title, record["wall_seconds"] if record else None, guesses.seconds(cell)))
    print_plan(rows, cells.comparison.notes, console)
