"""Finished runs of comparisons, kept in one JSON file that is meant to be committed: the tables need nothing else."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graftlm.comparing.tasks import same_measure
from graftlm.errors import UserError
from graftlm.files import locked, read_json, write_json
from graftlm.identity import same_settings
from graftlm.reporting.rundata import RunData

FORMAT = 1
TRAIN_POINTS = 200
"""Points kept of a training curve."""

Record = dict[str, Any]
"""What is kept of a finished run; `record_of` makes it."""


class Results:
    """The file of finished runs, by key. Every change is on the disk, whole, before `put` returns."""

    def __init__(self, path: Path):
        self.path = path
        self._cells: dict[str, Record] = {}
        self._read()

    def _read(self) -> None:
        if self.path.is_dir():
            raise UserError(f"results: {self.path} is a folder; name a file in it, e.g. {self.path / 'results.json'}")
        if not self.path.exists():
            return
        content = read_json(self.path)
        if not isinstance(content, dict) or not isinstance(content.get("cells"), dict):
            raise UserError(f"{self.path}: holds no results of a comparison; give another file as results")
        if content.get("format") != FORMAT:
            raise UserError(
                f"{self.path}: is of format {content.get('format')!r}, this version reads {FORMAT}; give another file "
                "as results"
            )
        self._cells = content["cells"]

    def get(self, key: str, settings: Mapping[str, Any]) -> Record | None:
        """The finished run `key`, unless it was made with other settings (a default has changed since)."""
        record = self._cells.get(key)
        return record if record is not None and same_settings(record["settings"], settings) else None

    def put(self, key: str, record: Record) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.parent, f".{self.path.name}.lock"):
            self._read()  # another session may have finished runs of its own meanwhile
            self._cells[key] = _with_tasks_of(record, self._cells.get(key))
            write_json(self.path, {"format": FORMAT, "cells": dict(sorted(self._cells.items()))})

    def records(self) -> Iterator[Record]:
        yield from self._cells.values()


def _with_tasks_of(record: Record, earlier: Record | None) -> Record:
    """The record of a run that was done again for other tasks, with what it scored before on as many questions, unless
    a task is among both (it may have had other shots) or it came to other weights than before (other hardware)."""
    if earlier is not None and earlier.get("eval_loss_end") != record.get("eval_loss_end"):
        return record
    if earlier is None or not earlier.get("tasks") or not same_settings(earlier["settings"], record["settings"]):
        return record
    old, new = earlier["tasks"], record.get("tasks") or {**earlier["tasks"], "asked": [], "results": {}}
    if not same_measure(old, new) or old["results"].keys() & new["results"].keys():
        return record
    asked = list(dict.fromkeys([*old["asked"], *new["asked"]]))
    parts = {key: old.get(key, {}) | new.get(key, {}) for key in ("results", "data")}
    return {**record, "tasks": {**new, "asked": asked, **parts}}


def record_of(run: RunData, settings: Mapping[str, Any], *, wall_seconds: float, tasks: Mapping[str, Any]) -> Record:
    """What the tables need of a finished run, read from its folder.

    settings: identity.settings_of its config. wall_seconds: of its processes so far, from start to end.
    """
    summary = run.summary
    kept = (
        *("method", "tokens", "steps", "seconds", "tokens_per_second", "peak_memory_bytes", "trainable_parameters"),
        *("trainable_fraction", "total_parameters", "operator_parameters", "eval_loss_start", "eval_loss_end"),
        *("selection_loss", "notes"),
    )
    train = dict(zip(("tokens", "seconds", "loss"), run.series("train", "tokens", "seconds", "loss"), strict=True))
    every = max(1, -(-len(train["loss"]) // TRAIN_POINTS))
    return {
        "settings": dict(settings),
        **{key: summary.get(key) for key in kept},
        "stage_starts": [stage["step"] for stage in run.stages],
        "data": summary["data"],
        "curve": {
            key: [round(float(value), 6) for value in values]
            for key, values in zip(
                ("tokens", "seconds", "loss"), run.series("eval", "tokens", "seconds", "loss"), strict=True
            )
        },
        "training_curve": {
            # Means over neighbours, so that a thinned curve tells of every step.
            key: [round(float(v[i : i + every].mean()), 6) for i in range(0, len(v), every)]
            for key, v in train.items()
        },
        "tasks": dict(tasks),
        "wall_seconds": round(max(wall_seconds, summary["seconds"] or 0.0), 1),  # a killed process has not told its own
        "environment": run.environment,
    }
