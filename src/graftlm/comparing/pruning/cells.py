"""The cells of a comparison of ways of pruning: the original, then every variant at every size with every seed."""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.comparing.pruning.config import ORIGINAL, PruneComparison, Size
from graftlm.comparing.pruning.jobs import Job
from graftlm.comparing.results import Record, Results
from graftlm.comparing.taken import Taken
from graftlm.comparing.tasks import Tasks
from graftlm.identity import by_content, content_of_sources, key_of

KIND = "prune"
"""What marks the records of these cells among those of training."""


@dataclass(frozen=True)
class PruneCell:
    """One pruned model (or the original), measured."""

    arm: str
    """Name of the variant; ORIGINAL for the model before pruning."""
    size: Size | None
    seed: int | None
    job: Job | None
    """With that seed; None for the original."""
    settings: dict[str, Any]
    key: str

    @property
    def title(self) -> str:
        return f"{self.arm} at {self.size.label}, seed {self.seed}" if self.size else self.arm

    @property
    def method(self) -> str:
        return self.job.method if self.job else ORIGINAL

    @property
    def folder(self) -> str:
        """Name of its folder."""
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in self.title)
        return f"{name}-{self.key[:8]}"


class PruneCells:
    """The cells of a comparison, laid over what is finished."""

    def __init__(
        self, comparison: PruneComparison, results: Results, failed: Callable[[str], bool] = lambda key: False
    ):
        self.comparison = comparison
        self.results = results
        self.failed = failed
        """Whether a cell (by key) has been tried in vain."""
        self._shared = self._shared_settings()
        self._made: dict[tuple[str, Size | None, int], PruneCell] = {}

    def wanted(self) -> Iterator[PruneCell]:
        """All cells, of each seed the smallest cut first; the original before them."""
        yield self.original()
        for seed in self.comparison.settings.seeds:
            for size in self.comparison.sizes:
                for arm in self.comparison.arms:
                    yield self.cell(arm.name, size, seed)

    def open(self) -> list[PruneCell]:
        """Those of `wanted` that are neither finished nor tried in vain."""
        seen: set[str] = set()
        found = []
        for cell in self.wanted():
            if cell.key not in seen and self.record(cell) is None and not self.failed(cell.key):
                found.append(cell)
            seen.add(cell.key)
        return found

    def original(self) -> PruneCell:
        """The model before pruning."""
        if (ORIGINAL, None, 0) not in self._made:
            settings = {**self._shared, "data": []}  # it has no use for the data
            self._made[ORIGINAL, None, 0] = PruneCell(ORIGINAL, None, None, None, settings, key_of(settings))
        return self._made[ORIGINAL, None, 0]

    def cell(self, arm: str, size: Size, seed: int) -> PruneCell:
        """One variant at one size with one seed."""
        if (arm, size, seed) not in self._made:
            unseeded = dict(next(one for one in self.comparison.arms if one.name == arm).by_size)[size]
            job = unseeded.with_seed(seed)
            settings = {**self._shared, **job.identity()}
            key = key_of({**self._shared, **job.key()})
            self._made[arm, size, seed] = PruneCell(arm, size, seed, job, settings, key)
        return self._made[arm, size, seed]

    def record(self, cell: PruneCell) -> Record | None:
        """The finished cell, unless its scores are of other questions than those that are there now."""
        record = self.results.get(cell.key, cell.settings)
        return record if record is not None and Tasks.of(self.comparison.settings).answered(record["tasks"]) else None

    def run_folder(self, cell: PruneCell) -> Path:
        return self.comparison.folder / "cells" / cell.folder

    def unchanged(self) -> bool:
        """Whether model, data and texts are still those that the cells were made for."""
        return self._shared == self._shared_settings()

    def _shared_settings(self) -> dict[str, Any]:
        """What all cells have in common, files by their content."""
        settings = self.comparison.settings
        return {
            "kind": KIND,
            "model": by_content(settings.model),
            "data": content_of_sources(settings.data) or [{"python_sources": platform.python_version()}],
            "perplexity": [by_content(text) for text in settings.perplexity],
            "perplexity_words": settings.perplexity_words,
            "max_length": settings.max_length,
            "tasks": sorted(settings.tasks),
            "task_limit": settings.task_limit,
            # Only where it is not the default: cells that were kept before there was a choice stay what they are.
            **({"dtype": settings.dtype} if settings.dtype != "float32" else {}),
        }


class Guesses:
    """How long a cell will take, from finished ones on the same hardware."""

    def __init__(self, results: Results):
        pruned = (one for one in results.records() if one["settings"].get("kind") == KIND)
        self._taken = Taken(pruned, lambda record: record["wall_seconds"])

    def seconds(self, cell: PruneCell) -> float | None:
        """Median of its method's cells, else of all; None if nothing is known."""
        return self._taken.median(cell.method, besides=ORIGINAL)

    def still(self, cell: PruneCell) -> float:
        return self.seconds(cell) or 0.0
