"""A stage that starts by splitting strong components into weak ones (Net2Net's widening, arXiv 1511.05641).

N takes a copy of P, and P's part of the output is divided between the two: the model computes what it did, except for
what N contributed before, which is let go. Both then learn apart. The zero start (section 3.2) changes nothing at all.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from graftlm.advantage import Choice
from graftlm.anatomy import Anatomy, Block
from graftlm.held_out import mean_loss
from graftlm.importance import with_labels
from graftlm.panels import Place
from graftlm.parts import Part, parts_in

Batch = Mapping[str, Tensor]
MEASURED_BATCHES = 4
"""Batches of the assessment before training that the effect of a split is measured on."""


@torch.no_grad()
def split(
    model: nn.Module,
    block: Block,
    choice: Choice,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Copy P's rows into N, and divide each of P's columns between N and P.

    N's share is drawn anew for every entry, uniformly from [0, 1]: with one share for a whole column the two copies
    would get gradients of one direction, which Adam makes equal, and they would stay alike for long. Optimizer state
    goes with the weights.
    """
    for matrix in (*block.mixed, *block.followers):
        for part in parts_in(model, matrix):
            n, p = _places(part, choice)
            for moment in _moments(part.parameter, optimizer):
                n.put_(moment, p.take(moment))
            strong = p.take(part.parameter)  # [slots, k, other]
            if matrix.dim == 0:
                n.put_(part.parameter, strong)
            else:
                given = (torch.rand(strong.shape, generator=generator).to(strong.device) * strong).to(strong.dtype)
                n.put_(part.parameter, given)
                p.put_(part.parameter, strong - given)


def _places(part: Part, choice: Choice) -> tuple[Place, Place]:
    """Where N and P lie in `part`."""
    matrix, device = part.matrix, part.parameter.device
    n, p = (matrix.index(c).to(device) for c in (choice.disadvantageous, choice.advantageous))
    return Place(n, matrix.dim, matrix.width), Place(p, matrix.dim, matrix.width)


def _moments(parameter: Tensor, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """What the optimizer keeps of every entry of `parameter`."""
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    return [m for m in state.values() if torch.is_tensor(m) and m.shape == parameter.shape]


class Splitter:
    """Splits at the start of a stage, kind by kind, and takes it back where the loss rises by more than `tolerance`."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, tolerance: float):
        self._model = model
        self._anatomy = anatomy
        self._tolerance = tolerance
        self._batches: list[Batch] = []
        self.notes: list[str] = []

    def watching(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`batches`, the first of which are kept to measure splits on."""
        rest = iter(batches)
        self._batches = [{key: value.cpu() for key, value in batch.items()} for batch in islice(rest, MEASURED_BATCHES)]
        yield from self._batches
        yield from rest

    @torch.no_grad()
    def split(
        self,
        choices: Mapping[str, Choice],
        generators: Mapping[str, torch.Generator],
        optimizer: torch.optim.Optimizer | None,
        stage: int,
    ) -> None:
        """Split all blocks of a kind, then those of the other, each by its choice and generator."""
        before = self._loss()
        for kind in self._anatomy.kinds:
            blocks = list(self._anatomy.of_kind(kind))
            kept = [self._remember(block, choices[block.name], optimizer) for block in blocks]
            for block in blocks:
                split(self._model, block, choices[block.name], generators[block.name], optimizer)
            after = self._loss()
            accepted = after - before <= self._tolerance
            self.notes.append(
                f"stage {stage + 1}: splitting {kind} changed the loss by {after - before:+.4f} nats"
                + ("" if accepted else f", more than split_tolerance ({self._tolerance}), and was taken back")
            )
            if accepted:
                before = after
            else:
                for restore in kept:
                    for place, tensor, panel in restore:
                        place.put_(tensor, panel)

    def _remember(
        self, block: Block, choice: Choice, optimizer: torch.optim.Optimizer | None
    ) -> list[tuple[Place, Tensor, Tensor]]:
        """All that a split writes to: where, in which tensor, and what is there now."""
        found = []
        for matrix in (*block.mixed, *block.followers):
            for part in parts_in(self._model, matrix):
                for tensor in (part.parameter, *_moments(part.parameter, optimizer)):
                    found += [(place, tensor, place.take(tensor)) for place in _places(part, choice)]
        return found

    def _loss(self) -> float:
        """On the first batches, over all of their tokens where none is supervised."""
        return mean_loss(self._model, [with_labels(batch) for batch in self._batches])

    def state(self) -> dict[str, Tensor]:
        return {f"{i}.{key}": value for i, batch in enumerate(self._batches) for key, value in batch.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        batches: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            number, _, key = name.partition(".")
            batches.setdefault(int(number), {})[key] = value
        self._batches = [batches[i] for i in sorted(batches)]
