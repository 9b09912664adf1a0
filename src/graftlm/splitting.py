"""A stage that starts by splitting strong components into weak ones (Net2Net's widening, arXiv 1511.05641).

N takes a copy of P, and P's part of the output is divided between the two: the model computes what it did, except for
what N contributed before, which is let go. Both then learn apart. The zero start (section 3.2) changes nothing at all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from graftlm.advantage import Choice
from graftlm.anatomy import Anatomy, Block, Kind
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


class _Splits:
    """Blocks of which the first ones are split, as many as asked."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        choices: Mapping[str, Choice],
        generators: Mapping[str, torch.Generator],
        optimizer: torch.optim.Optimizer | None,
    ):
        self._model, self._optimizer = model, optimizer
        self._blocks = [(block, choices[block.name], generators[block.name]) for block in blocks]
        self._drawn = [generator.get_state() for _, _, generator in self._blocks]
        self._kept = [self._remember(block, choice) for block, choice, _ in self._blocks]
        self.total, self._done = len(blocks), 0

    def turn_to(self, count: int) -> None:
        """Have the first `count` blocks split, and no other."""
        for number in range(self._done, count):
            block, choice, generator = self._blocks[number]
            generator.set_state(self._drawn[number])  # so that a block is split alike every time
            split(self._model, block, choice, generator, self._optimizer)
        for number in range(count, self._done):
            for place, tensor, panel in self._kept[number]:
                place.put_(tensor, panel)
        self._done = count

    def _remember(self, block: Block, choice: Choice) -> list[tuple[Place, Tensor, Tensor]]:
        """All that a split writes to: where, in which tensor, and what is there now."""
        found = []
        for matrix in (*block.mixed, *block.followers):
            for part in parts_in(self._model, matrix):
                for tensor in (part.parameter, *_moments(part.parameter, self._optimizer)):
                    found += [(place, tensor, place.take(tensor)) for place in _places(part, choice)]
        return found


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
            splits = _Splits(self._model, blocks, choices, generators, optimizer)
            rise, note = self._split_most(splits, before)
            before += rise
            self.notes.append(f"stage {stage + 1}: splitting {kind} {note}")

    def _split_most(self, splits: _Splits, before: float) -> tuple[float, str]:
        """Split as many blocks as the tolerance allows: by how much the loss rose, and what to say of it."""
        rises = {0: 0.0}

        def fits(count: int) -> bool:
            splits.turn_to(count)
            rises[count] = self._loss() - before
            return rises[count] <= self._tolerance

        done = most(splits.total, fits)
        splits.turn_to(done)
        note = f"changed the loss by {rises[splits.total]:+.4f} nats"
        if done < splits.total:
            note += f", more than split_tolerance ({self._tolerance}), and was taken back in {splits.total - done} of "
            note += f"{splits.total} layers" + (f"; in the others by {rises[done]:+.4f}" if done else "")
        return rises[done], note

    def _loss(self) -> float:
        """On the first batches, over all of their tokens where none is supervised."""
        return mean_loss(self._model, [with_labels(batch) for batch in self._batches])

    def state(self) -> dict[str, Tensor]:
        batches = {f"{i}.{key}": value for i, batch in enumerate(self._batches) for key, value in batch.items()}
        return batches | {"notes": torch.tensor(list("\n".join(self.notes).encode()), dtype=torch.uint8)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        told = dict(state)
        self.notes = bytes(told.pop("notes").tolist()).decode().splitlines()
        batches: dict[int, dict[str, Tensor]] = {}
        for name, value in told.items():
            number, _, key = name.partition(".")
            batches.setdefault(int(number), {})[key] = value
        self._batches = [batches[i] for i in sorted(batches)]
