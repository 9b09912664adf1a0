"""Which runs a comparison needs, in the order in which they are worth most, given those that are finished."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.comparing.config import Arm, Comparison, scaled_steps
from graftlm.comparing.results import Record, Results
from graftlm.comparing.tasks import Tasks
from graftlm.identity import key_of, settings_of
from graftlm.stages import StageClock
from graftlm.training.config import RunConfig


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    arm: str
    seed: int
    learning_rate: float
    multiple: float
    """Of the arm's own tokens: other than 1 for plain training's curve."""
    config: RunConfig
    """Complete but for the run folder."""
    key: str
    settings: dict[str, Any]
    """identity.settings_of its config."""

    @property
    def title(self) -> str:
        times = f", {self.multiple:g} x the tokens" if self.multiple != 1 else ""
        return f"{self.arm}, seed {self.seed}, learning rate {self.learning_rate:g}{times}"

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in self.arm)
        times = f"-x{self.multiple:g}" if self.multiple != 1 else ""
        return f"{name}-seed{self.seed}-lr{self.learning_rate:g}{times}-{self.key[:8]}"


class Cells:
    """The runs of a comparison, laid over what is finished."""

    def __init__(self, comparison: Comparison, results: Results, failed: Callable[[str], bool] = lambda key: False):
        self.comparison = comparison
        self.results = results
        self.failed = failed
        """Whether a run (by key) has been tried in vain."""
        self._tasks = dataclasses.replace(Tasks.of(comparison.settings), dtype=comparison.settings.task_dtype)
        self._made: dict[tuple[str, int, float, float, tuple[int, ...]], Cell] = {}

    def wanted(self) -> Iterator[Cell]:
        """Every run whose settings are known already: of each seed the controls, then the other arms; then plain
        training at other lengths. Finishing some makes others known: a control whose learning rate follows stages that
        end by epochs or tokens, and all runs at a learning rate that is still to be chosen."""
        seen: set[str] = set()
        for cell in self._all():
            if cell is not None and cell.key not in seen:
                seen.add(cell.key)
                yield cell

    def _all(self) -> Iterator[Cell | None]:
        arms = self.comparison.arms
        for seed in self.comparison.settings.seeds:
            # A control that must wait for its arm is asked for again after it.
            for arm in [*arms, *self.comparison.controls]:
                for rate in self.rates(arm, seed):
                    yield self.cell(arm, seed, rate)
        for seed in self.comparison.settings.seeds:
            for arm in self.comparison.controls:
                chosen = self.chosen_rate(arm)
                if chosen is not None:
                    for multiple in self.comparison.settings.plain_multiples:
                        yield self.cell(arm, seed, chosen, multiple)

    def open(self) -> list[Cell]:
        """Those of `wanted` that are neither finished nor tried in vain."""
        return [cell for cell in self.wanted() if self.record(cell) is None and not self.failed(cell.key)]

    def later(self) -> int:
        """How many runs cannot be named yet: those at a learning rate that is still to be chosen, and those whose
        learning rate follows stages that are still to be seen."""
        count, multiples = 0, [one for one in self.comparison.settings.plain_multiples if one != 1]
        for arm in self.comparison.arms:
            chosen = self.chosen_rate(arm)
            for seed in self.comparison.settings.seeds:
                asked: list[tuple[float | None, float]] = [(rate, 1.0) for rate in self.rates(arm, seed) or (None,)]
                asked += [(chosen, multiple) for multiple in multiples if arm.matched is None]
                count += sum(rate is None or self.cell(arm, seed, rate, multiple) is None for rate, multiple in asked)
        return count

    def run_folder(self, cell: Cell) -> Path:
        return self.comparison.folder / "cells" / cell.folder

    def record(self, cell: Cell | None) -> Record | None:
        """The finished run of a cell, with all the tasks that it was to be evaluated on."""
        record = self.trained(cell)
        if cell is None or record is None:
            return None
        tasks = self.tasks(cell)
        return record if tasks is None or tasks.answered(record["tasks"]) else None

    def tasks(self, cell: Cell) -> Tasks | None:
        """What a run is evaluated on: plain training at other lengths, and a learning rate that is not (or not yet)
        chosen, on nothing."""
        chosen = (self.chosen_rate(arm) == cell.learning_rate for arm in self._arms_of(cell))
        if not self._tasks.asked or not any(chosen):
            return None
        return dataclasses.replace(self._tasks, trust_remote_code=cell.config.trust_remote_code)

    def settled(self, cell: Cell) -> bool:
        """Whether nothing more is wanted of a cell's model."""
        if self._tasks.asked and any(self.chosen_rate(arm) is None for arm in self._arms_of(cell)):
            return False
        return self.record(cell) is not None

    def trained(self, cell: Cell | None) -> Record | None:
        """The finished run of a cell, evaluated on tasks or not: what a learning rate is chosen by."""
        return None if cell is None else self.results.get(cell.key, cell.settings)

    def _arms_of(self, cell: Cell) -> Iterator[Arm]:
        """The arms of which this is a run of their own length: another one may come to the same run."""
        for arm in self.comparison.arms if cell.multiple == 1 else ():
            same = cell.learning_rate in arm.learning_rates and self.cell(arm, cell.seed, cell.learning_rate)
            if same and same.key == cell.key:
                yield arm

    def rates(self, arm: Arm, seed: int) -> tuple[float, ...]:
        """Learning rates that `arm` is run at with this seed, as far as known."""
        chosen = self.chosen_rate(arm)
        if seed in self.comparison.selection_seeds:
            return arm.learning_rates
        return () if chosen is None else (chosen,)

    def chosen_rate(self, arm: Arm) -> float | None:
        """The learning rate with the lowest loss on the selection data, on average over the selection seeds; None as
        long as a run is missing. One at which training failed (it diverged, say) is not in the running."""
        if len(arm.learning_rates) == 1:
            return arm.learning_rates[0]
        losses: dict[float, float] = {}
        for rate in arm.learning_rates:
            cells = [self.cell(arm, seed, rate) for seed in self.comparison.selection_seeds]
            records = [self.trained(cell) for cell in cells]
            missing = [cell for cell, record in zip(cells, records, strict=True) if record is None]
            if any(cell is not None and self.failed(cell.key) for cell in missing):
                continue
            if missing:
                return None
            losses[rate] = sum(record["selection_loss"] for record in records if record) / len(records)
        return min(losses, key=losses.__getitem__) if losses else None

    def cell(self, arm: Arm, seed: int, rate: float, multiple: float = 1.0) -> Cell | None:
        """One run of `arm`; None while the steps at which its learning rate's stages begin are not known."""
        starts = self._stage_starts(arm, seed)
        if starts is None:
            return None
        made = (arm.name, seed, rate, multiple, starts)
        if made not in self._made:
            config = dataclasses.replace(
                arm.config,
                seed=seed,
                learning_rate=rate,
                stage_starts=tuple(round(start * multiple) for start in starts),
                **_scaled_length(arm.config, multiple),
            )
            settings = settings_of(config)
            self._made[made] = Cell(arm.name, seed, rate, multiple, config, key_of(settings), settings)
        return self._made[made]

    def _stage_starts(self, arm: Arm, seed: int) -> tuple[int, ...] | None:
        """Steps at which the stages begin that a control's learning rate follows; () where it follows none."""
        if arm.follows is None:
            return ()
        followed = self.comparison.arm(arm.follows)
        if (planned := planned_stage_starts(followed.config)) is not None:
            return planned
        for rate in self.rates(followed, seed):  # when stages end depends on tokens, and not on the learning rate
            if (record := self.trained(self.cell(followed, seed, rate))) is not None:
                return tuple(record["stage_starts"])
        return None


def planned_stage_starts(config: RunConfig) -> tuple[int, ...] | None:
    """Steps at which the stages of a run begin; None where only the run itself tells (epochs, tokens)."""
    if config.apex.stage_by != "steps" or config.max_steps < 0:
        return None
    clock = StageClock(config.apex, total_steps=config.max_steps)
    for clock.step in range(1, config.max_steps):
        if clock.due(epoch=None, tokens=0):
            clock.next_stage()
    return tuple(clock.starts)


def _scaled_length(config: RunConfig, multiple: float) -> dict[str, Any]:
    if config.max_steps > 0:
        return {"max_steps": scaled_steps(config.max_steps, multiple)}
    return {"num_train_epochs": config.num_train_epochs * multiple}
