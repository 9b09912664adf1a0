"""A stage that starts by splitting strong components into weak ones (Net2Net's widening, arXiv 1511.05641).

N takes a copy of P, and P's part of the output is divided between the two: the model computes what it did, except for
what N contributed before, which is let go. Both then learn apart. The zero start (section 3.2) changes nothing at all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graftlm.advantage import Choice
from graftlm.anatomy import Anatomy, Block, Kind
from graftlm.held_out import mean_loss
from graftlm.importance import with_labels
from graftlm.masking import masked
from graftlm.moments import moments_of
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
            state = optimizer.state.get(part.parameter, {}) if optimizer is not None else {}
            for moment in moments_of(state, part.parameter):
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


def activity(block: Block, choice: Choice, activations: Tensor) -> float:
    """N's part of the squared activations [ranked] of a block."""
    by_component = activations.view(block.components, block.slots).sum(1)
    whole = float(by_component.sum())
    return float(by_component[choice.disadvantageous].sum()) / whole if whole else 0.0


def most(count: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `count` that fits, found by halving; 0 does, and `count` is tried first."""
    low, high, tried = 0, count + 1, count
    while low + 1 < high:
        low, high = (tried, high) if fits(tried) else (low, tried)
        tried = (low + high) // 2
    return low


class Splitter:
    """Splits at the start of a stage, kind by kind: as many blocks as raise the loss by no more than `tolerance`."""

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
        activations: Mapping[Kind, Mapping[int, Tensor]],
        generators: Mapping[str, torch.Generator],
        optimizer: torch.optim.Optimizer | None,
        stage: int,
    ) -> None:
        """Split blocks of a kind, then of the other, each by its choice and generator.

        activations: of all units, [ranked] by kind and layer. A split lets go what N contributed, so the blocks whose N
        is least active come first.
        """
        before = self._loss()
        for kind in self._anatomy.kinds:
            if any(block.norms for block in self._anatomy.of_kind(kind)):
                self.notes.append(
                    f"stage {stage + 1}: no split of {kind}: a norm over all of them would change with one"
                )
                continue
            blocks = sorted(
                self._anatomy.of_kind(kind),
                key=lambda block: activity(block, choices[block.name], activations[block.kind][block.layer]),
            )
            done, rise, note = self._most([(block, choices[block.name]) for block in blocks], before)
            before += rise
            self.notes.append(f"stage {stage + 1}: splitting {kind} {note}")
            for block in blocks[:done]:
                split(self._model, block, choices[block.name], generators[block.name], optimizer)

    def _most(self, blocks: Sequence[tuple[Block, Choice]], before: float) -> tuple[int, float, str]:
        """How many of `blocks`, from the first, may be split, by how much the loss then rises, and what to say of it.

        A split model computes what it does without the N of those blocks, so that is what is measured.
        """
        rises = {0: 0.0}

        def fits(count: int) -> bool:
            units = {block.name: block.units(choice.disadvantageous) for block, choice in blocks[:count]}
            with masked(self._model, self._anatomy, units):
                rises[count] = self._loss() - before
            return rises[count] <= self._tolerance

        total, done = len(blocks), most(len(blocks), fits)
        note = f"changed the loss by {rises[total]:+.4f} nats"
        if done < total:
            note += f", more than split_tolerance ({self._tolerance}), and is left out in {total - done} of "
            note += f"{total} layers" + (f"; in the others by {rises[done]:+.4f}" if done else "")
        return done, rises[done], note

    def _loss(self) -> float:
        """On the first batches, over all of their tokens where none is supervised."""
        return mean_loss(self._model, [with_labels(batch) for batch in self._batches])

    def state(self) -> dict[str, Tensor]:
        """Of all processes, in turn: each measures on batches of its own. All must ask."""
        everybody: list[Any] = [self._batches]
        if dist.is_initialized():
            everybody = [None] * dist.get_world_size()
            dist.all_gather_object(everybody, self._batches)
        kept = [batch for several in zip_longest(*everybody) for batch in several if batch is not None]
        batches = {f"{i}.{key}": value for i, batch in enumerate(kept) for key, value in batch.items()}
        return batches | {"notes": torch.tensor(list("\n".join(self.notes).encode()), dtype=torch.uint8)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        told = dict(state)
        self.notes = bytes(told.pop("notes").tolist()).decode().splitlines()
        batches: dict[int, dict[str, Tensor]] = {}
        for name, value in told.items():
            number, _, key = name.partition(".")
            batches.setdefault(int(number), {})[key] = value
        processes, mine = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self._batches = [batches[i] for i in sorted(batches)[mine::processes]]
