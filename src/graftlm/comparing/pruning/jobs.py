"""What one cell does, in a process of its own (work.py): prune, or prune and train in turn."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from graftlm.identity import by_content, content_of_sources, settings_of
from graftlm.pruning.settings import METHODS, PruneSettings
from graftlm.pruning.shrink.config import NOT_IN_TRAIN, Shrink, decay_over, default_values
from graftlm.pruning.ways import sequences_seen
from graftlm.training.config import SourceConfig

DONE = "done.json"
MODEL = "model"
"""What the process leaves in the cell's folder: the model first."""
ELSEWHERE = ("model", "data", "output_dir", "keep")
"""Of a shrink: what a cell's settings have already, or do not depend on."""


@dataclass(frozen=True)
class PruneJob:
    """One call of a pruning method."""

    settings: PruneSettings
    sparsity_of: Literal["parameters", "channels"]

    @property
    def method(self) -> str:
        return self.settings.method

    @property
    def pruning(self) -> PruneSettings:
        return self.settings

    def with_seed(self, seed: int) -> "PruneJob":
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, seed=seed))

    def given(self) -> dict[str, Any]:
        """Its settings as JSON, for work.py."""
        return {"prune": dataclasses.asdict(self.settings), "sparsity_of": self.sparsity_of}

    def identity(self) -> dict[str, Any]:
        """What a finished cell's settings say of it: without those of other methods, whose defaults may change."""
        given = self.given()
        return {**given, "prune": {key: value for key, value in given["prune"].items() if self._concerns(key)}}

    def _concerns(self, key: str) -> bool:
        owner = key.partition("_")[0]  # flap_compensation, sheared_steps
        return owner not in METHODS or owner == self.method

    @property
    def calibration_tokens(self) -> int:
        """That the method looks at; repeated ones count again."""
        return sequences_seen(self.settings) * self.settings.sample_length

    def key(self) -> dict[str, Any]:
        """The same as far as it is not the default, so that a setting added later leaves the keys of old cells."""
        defaults = {**dataclasses.asdict(PruneSettings(sparsity=0.5)), "sparsity": None}
        given = self.identity()
        return {**given, "prune": changed(given["prune"], defaults)}


@dataclass(frozen=True)
class ShrinkJob:
    """Pruning and training in turn."""

    task: Shrink

    @property
    def method(self) -> str:
        return f"shrink, {self.task.prune.method}"

    @property
    def pruning(self) -> PruneSettings:
        return self.task.prune

    def with_seed(self, seed: int) -> "ShrinkJob":
        prune = dataclasses.replace(self.task.prune, seed=seed)
        run = dataclasses.replace(self.task.run, seed=seed)
        return ShrinkJob(dataclasses.replace(self.task, prune=prune, run=run))

    calibration_tokens = None
    """Its phases, which follow from the model, have their own: told when it is done."""

    def given(self) -> dict[str, Any]:
        return {"shrink": self.task.to_dict()}

    def identity(self) -> dict[str, Any]:
        values = {key: value for key, value in self.task.to_dict().items() if key not in ELSEWHERE}
        distillation = {**values["distillation"], "teacher": by_content(values["distillation"]["teacher"])}
        eval_data = content_of_sources(self.task.settings.eval_data)
        unused = NOT_IN_TRAIN if self.task.settings.recovery == "apex" else {*NOT_IN_TRAIN, "apex"}
        train = {key: value for key, value in settings_of(self.task.run).items() if key not in unused}
        return {"shrink": {**values, "eval_data": eval_data, "distillation": distillation, "train": train}}

    def key(self) -> dict[str, Any]:
        source = dataclasses.asdict(SourceConfig(""))
        given = self.identity()["shrink"]
        eval_data = [changed(one, source) for one in given["eval_data"]]
        defaults = default_values(self.task.run.max_steps)
        train = defaults["train"] | {"lr_scheduler_kwargs": decay_over(self.task.run.max_steps)}
        return {"shrink": changed({**given, "eval_data": eval_data}, defaults | {"train": train})}


Job = PruneJob | ShrinkJob


def changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ from the defaults, in nested mappings too."""
    found = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            value = changed(value, default)
            default = {}
        if value != default:
            found[name] = value
    return found
