"""Where a phase's files lie, and which of them are deleted when."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from graftlm.files import atomic_folder
from graftlm.pruning.shrink.phases import Phase
from graftlm.training.checkpoints import list_checkpoints

WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class PhaseFolder:
    """phase_01/ of a shrink: pruned/ (a model), then train/ (a run folder)."""

    root: Path
    phase: Phase

    @property
    def path(self) -> Path:
        return self.root / self.phase.name

    @property
    def pruned(self) -> Path:
        """The pruned model; written whole or not at all."""
        return self.path / "pruned"

    @property
    def facts(self) -> Path:
        """What pruning did: the last file of `pruned`, which stays when its weights go."""
        return self.facts_in(self.pruned)

    @staticmethod
    def facts_in(pruned: Path) -> Path:
        return pruned / "phase.json"

    @staticmethod
    def start_in(pruned: Path) -> Path:
        """What training begins with besides weights (training.phases)."""
        return pruned / "start"

    @property
    def train(self) -> Path:
        """The run folder of its training."""
        return self.path / "train"

    @property
    def summary(self) -> Path:
        """There when its training is finished."""
        return self.train / "summary.json"

    @property
    def trained(self) -> Path:
        """The trained model."""
        return self.train / "model"

    def put_checkpoint(self) -> None:
        """Give the run folder the checkpoint that its training begins with, where it has none yet."""
        if list_checkpoints(self.train):
            return
        with atomic_folder(self.train / "checkpoints" / f"step-{self.phase.first}") as temporary:
            for file in [*self.pruned.glob("*.safetensors*"), self.pruned / "config.json"]:
                _link(file, temporary / file.name)
            for file in self.start_in(self.pruned).iterdir():
                _link(file, temporary / file.name)

    def drop_weights(self) -> None:
        """Delete what is large; what was measured stays."""
        for folder in (self.start_in(self.pruned), self.trained, self.train / "checkpoints"):
            shutil.rmtree(folder, ignore_errors=True)
        for file in self.pruned.glob(WEIGHTS):
            file.unlink()


def _link(file: Path, new: Path) -> None:
    """The same file under a second name, or a copy where the disk knows no such thing."""
    try:
        os.link(file, new)
    except OSError:
        shutil.copyfile(file, new)
