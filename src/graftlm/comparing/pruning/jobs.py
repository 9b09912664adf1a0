"""What one cell does, in a process of its own (work.py): prune, or prune and train in turn."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from graftlm.comparing.identity import by_content, content_of_sources
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.shrink.config import Shrink, ShrinkConfig, make_shrink
from graftlm.training.config import SourceConfig

DONE = "done.json"
MODEL = "model"
"""What the process leaves in the cell's folder: the model first."""
ELSEWHERE = ("model", "data", "output_dir")
"""Of a shrink: what a cell's settings have already, or do not depend on."""


@dataclass(frozen=True)
class PruneJob:
    """One call of a pruning method."""

    settings: PruneSettings
    sparsity_of: Literal["parameters", "channels"]

    @property
    def method(self) -> str:
        return self.settings.method

    def with_seed(self, seed: int) -> "PruneJob":
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, seed=seed))

    def given(self) -> dict[str, Any]:
        """Its settings as JSON, for work.py."""
        return {"prune": dataclasses.asdict(self.settings), "sparsity_of": self.sparsity_of}

    def identity(self) -> dict[str, Any]:
        """What a finished cell's settings say of it."""
        return self.given()

    def key(self) -> dict[str, Any]:
        """The same as far as it is not the default, so that a setting added later leaves the keys of old cells."""
        defaults = {**dataclasses.asdict(PruneSettings(sparsity=0.5)), "sparsity": None}
        given = self.given()
        return {**given, "prune": changed(given["prune"], defaults)}


@dataclass(frozen=True)
class ShrinkJob:
    """Pruning and training in turn."""

    task: Shrink

    @property
    def method(self) -> str:
        return f"shrink, {self.task.prune.method}"

    def with_seed(self, seed: int) -> "ShrinkJob":
        prune = dataclasses.replace(self.task.prune, seed=seed)
        run = dataclasses.replace(self.task.run, seed=seed)
        return ShrinkJob(dataclasses.replace(self.task, prune=prune, run=run))

    def given(self) -> dict[str, Any]:
        return {"shrink": self.task.to_dict()}

    def identity(self) -> dict[str, Any]:
        values = {key: value for key, value in self.task.to_dict().items() if key not in ELSEWHERE}
        distillation = {**values["distillation"], "teacher": by_content(values["distillation"]["teacher"])}
        eval_data = content_of_sources(self.task.settings.eval_data)
        return {"shrink": {**values, "eval_data": eval_data, "distillation": distillation}}

    def key(self) -> dict[str, Any]:
        plain = make_shrink(ShrinkConfig("", (SourceConfig(""),), target_parameters=1, max_steps=1)).to_dict()
        given = self.identity()["shrink"]
        source = dataclasses.asdict(SourceConfig(""))
        return {"shrink": changed({**given, "eval_data": [changed(one, source) for one in given["eval_data"]]}, plain)}


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
