"""Runs what a comparison still needs, one run at a time; what is finished is never run again."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from graftlm.comparing.cells import Cell, Cells
from graftlm.comparing.config import load_comparison
from graftlm.comparing.loop import Say, alone, close, print_plan, run_open
from graftlm.comparing.process import check_writable, discard, run_record, seconds_lost, seconds_spent
from graftlm.comparing.report import write_outputs
from graftlm.comparing.results import Record, Results
from graftlm.comparing.summary import summarise
from graftlm.comparing.tables import print_tables
from graftlm.comparing.taken import Taken
from graftlm.comparing.tasks import Tasks
from graftlm.errors import UserError
from graftlm.files import check_file
from graftlm.identity import settings_of
from graftlm.reporting import figures
from graftlm.yaml_nodes import child_of, parse_file


def compare(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    minutes: float | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what the comparison in `path` still needs, and write its tables and report; returns comparison.json.

    A file with the key `prune` or `shrink` compares ways of pruning (comparing/pruning), any other ways of training.

    minutes: start no run that would not fit, and interrupt one that does not end in time; what was finished stays, and
    the next call goes on. dry_run: only say what would be run (returns what is known so far).

    Raises UserError for a config that is not allowed, results that cannot be compared, and, after everything else has
    been run and written, for runs that failed.
    """
    console = console or Console()
    if any(child_of(parse_file(str(path)), key) is not None for key in ("prune", "shrink")):
        from graftlm.comparing.pruning.runner import compare_pruning  # here: only where it is wanted

        return compare_pruning(path, overrides, minutes=minutes, dry_run=dry_run, console=console)
    comparison = load_comparison(path, overrides)
    results = Results(comparison.results_path)
    failed: dict[str, str] = {}
    cells = Cells(comparison, results, failed.__contains__)
    if dry_run:
        _print_plan(cells, console)
        return summarise(comparison, cells, failed)
    if comparison.settings.tasks and any(cell.multiple == 1 for cell in cells.open()):
        Tasks.of(comparison.settings).check()
    check_writable(comparison.folder)
    check_file(comparison.results_path)  # now rather than when the first run is to be kept
    with alone(comparison.folder):
        run_cells(cells, failed, minutes, console)
        summary = summarise(comparison, cells, failed)
        written = write_outputs(comparison.folder, summary)
    print_tables(summary, console)
    close(written, cells.open(), failed, comparison.folder, console)
    return summary


def run_cells(cells: Cells, failed: dict[str, str], minutes: float | None, console: Console) -> None:
    """Run open cells in order, for so many minutes. A failed run is put into `failed`, and the others go on."""

    def run(cell: Cell, left: float | None, say: Say) -> str:
        _check_unchanged(cell)
        folder = cells.run_folder(cell)
        config = dataclasses.replace(cell.config, output_dir=str(folder))
        record = run_record(config, cell.settings, tasks=cells.tasks(cell), seconds_left=left, say=say)
        if record["eval_loss_end"] is None:
            raise UserError(
                f"{cell.title}: was not evaluated, there was too little data; give base.eval_data, or more data"
            )
        cells.results.put(cell.key, record)
        _discard_settled(cells)
        return f"loss {figures.loss(record['eval_loss_end'])} in {figures.duration(record['wall_seconds'])}"

    _discard_settled(cells)  # what a kill has left
    run_open(cells.open, lambda: Guesses(cells).still, run, failed, minutes, console)


def _discard_settled(cells: Cells) -> None:
    """Delete the models of which nothing more is wanted. One at a learning rate that may still be chosen stays: only
    the chosen one is evaluated on tasks."""
    if not cells.comparison.settings.keep:
        for cell in cells.wanted():
            if cells.settled(cell):
                discard(cells.run_folder(cell))


def _check_unchanged(cell: Cell) -> None:
    now = settings_of(cell.config)
    if changed := [key for key in now if now[key] != cell.settings[key]]:
        raise UserError(
            f"{changed[0]}: its files have changed since the comparison began, so the rest would be trained on "
            "something else; put them back, or start again (finished runs on the old files are then not used)"
        )


class Guesses:
    """How long a run will take, from finished ones on the same hardware."""

    def __init__(self, cells: Cells):
        self._cells = cells
        # What was pruned has no steps.
        self._of_a_step = Taken(
            cells.results.records(), lambda one: one["wall_seconds"] / one["steps"] if "steps" in one else None
        )

    def seconds(self, cell: Cell) -> float | None:
        """Median seconds a step of its method's runs (else of all), times its steps; None if nothing is known."""
        if self._cells.trained(cell) is not None and self._cells.record(cell) is None and self._kept(cell):
            return None  # only its evaluation is left
        known, steps = self._of_a_step.median(cell.config.method), cell.config.max_steps
        return None if known is None or steps < 0 else known * steps

    def _kept(self, cell: Cell) -> bool:
        """Whether a finished run has its model still; without, it is trained again to be evaluated."""
        return (self._cells.run_folder(cell) / "model").exists()

    def still(self, cell: Cell) -> float:
        """Seconds until the end of a run that may have been begun; 0 if nothing is known."""
        folder = self._cells.run_folder(cell)
        return max(seconds_lost(folder), (self.seconds(cell) or 0.0) - seconds_spent(folder))


def _print_plan(cells: Cells, console: Console) -> None:
    guesses = Guesses(cells)
    rows = []
    for cell in cells.wanted():
        record: Record | None = cells.record(cell)
        rows.append((cell.title, record["wall_seconds"] if record else None, guesses.seconds(cell)))
    unchosen = any(cells.chosen_rate(arm) is None for arm in cells.comparison.arms)
    once = "learning rates are chosen" if unchosen else "it is known when stages end"
    later = f"; {count} more once {once}" if (count := cells.later()) else ""
    print_plan(rows, cells.comparison.notes, console, later=later)
