"""Raw and effective weights of one block (section 3.2): the model holds W~, and raw weights only inside a step.

With G the gradient of the loss by W~, as any backward pass leaves it:
    dW[N] = G[N]      dW[P] = G[P] + M^T G[N]      dM = G[N] W[P]^T  (through M's factors)
All three are linear in G, so one evaluation per optimizer step on the accumulated gradient is exact.
`reference.py` has the plain formulation (autograd through W~) that this must agree with.

Panels are [slots, k, other] (panels.py). Matrices of one shape can go through their operators in one batched product.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftlm.advantage import Choice
from graftlm.anatomy import Block
from graftlm.movement import some_rows
from graftlm.operators import stacked
from graftlm.panels import Place, add_all, local, put_all, take_all
from graftlm.ties import Piece, Tie

Gradients = Callable[[str], tuple[Tensor, Tensor | None] | None]
"""Gradient of the parameter of that name, looked up when used (wrappers replace Parameter objects). With it, where only
slices train, the place of each row or column in that gradient, -1 for those that do not train; None: all of them."""


@dataclass
class _Placed:
    """Where P and N of one piece lie during a stage; `both` is N, then P."""

    n: Place
    p: Place
    both: Place
    in_slice: tuple[Place, Place] | None = None
    """N and P in the gradient of a slice, where only slices train."""


class Expansion:
    """One block's P, N, ties and raw weights during a stage."""

    def __init__(self, model: nn.Module, block: Block, ties: list[Tie]):
        self.model = model
        self.block = block
        self.ties = ties
        self._choice: Choice | None = None
        self._placed: dict[str, _Placed] = {}
        self.raw: dict[str, Tensor] = {}
        """Raw panels: "<parameter>:n", and ":p" where diagonals change P too; the model holds the effective ones."""
        self.start: dict[str, Tensor] = {}
        """Some rows of each piece's N as the stage found them (movement.py), by the piece's key."""
        self.sliced = False
        """Only slices train. They know the raw values, and panels are kept in float32 at least, as slices are."""

    @property
    def choice(self) -> Choice | None:
        """P and N of the stage; None between stages."""
        return self._choice

    @choice.setter
    def choice(self, choice: Choice | None) -> None:
        self._choice, self._placed = choice, {}

    def placed(self, piece: Piece) -> _Placed:
        """Where P and N lie in `piece`; worked out once a stage."""
        if piece.key not in self._placed:
            assert self._choice is not None
            device = self.device
            n, p = (piece.matrix.index(c.to(device)) for c in (self._choice.disadvantageous, self._choice.advantageous))
            width = piece.matrix.width if piece.matrix.offset % piece.matrix.width == 0 else 1
            at_n, at_p, both = (Place(i, piece.dim, width) for i in (n, p, torch.cat([n, p], 1)))
            self._placed[piece.key] = _Placed(at_n, at_p, both)
        return self._placed[piece.key]

    def placed_in_slice(self, piece: Piece, places: Tensor) -> tuple[Place, Place]:
        """Where N and P lie in the gradient of a slice whose rows or columns are at `places`."""
        placed = self.placed(piece)
        if placed.in_slice is None:
            at_n, at_p = (Place(places[place.index], piece.dim, place.width) for place in (placed.n, placed.p))
            placed.in_slice = at_n, at_p
        return placed.in_slice

    def weight(self, piece: Piece) -> Tensor:
        """The piece's tensor in the model, as far as this rank holds it."""
        return local(self.model.get_parameter(piece.name).data)

    def mixed(self) -> Iterator["Mixed"]:
        for tie in self.ties:
            for piece in tie.pieces:
                yield Mixed(self, tie, piece)

    @property
    def device(self) -> torch.device:
        return self.model.get_parameter(f"{self.block.mixed[0].module}.weight").device

    def raw_keys(self) -> list[str]:
        """Names of the raw panels of a stage."""
        return [key for mixed in self.mixed() for key in mixed.raw_keys()]

    def advantageous_panels(self, tie: Tie) -> list[Tensor]:
        """What the tie's operator acts on."""
        return [m.placed.p.take(m.weight) for m in self.mixed() if m.tie is tie]

    @torch.no_grad()
    def begin(self, choice: Choice, generator: torch.Generator, scale: float = 1.0) -> None:
        """Start a stage: operators of exactly zero (their D scaled by `scale`); the model's weights are not touched, so
        its output stays."""
        self.choice = choice
        for tie in self.ties:
            tie.reset(generator, scale)
        self.raw = {}
        for mixed in self.mixed():
            remember([mixed])
        self.start = {mixed.piece.key: some_rows(mixed.raw_n()) for mixed in self.mixed()}

    def restore(self) -> None:
        """Put raw weights into the model, for the optimizer to step on."""
        for mixed in self.mixed():
            restore([mixed])

    def apply(self) -> None:
        """Keep the raw weights that the model holds now and write the effective ones."""
        for mixed in self.mixed():
            apply([mixed])

    def end(self) -> None:
        """Fusion (eq. 14): the model already holds W~, so forgetting the raw weights is all; not a bit changes."""
        self.raw, self.start = {}, {}
        self.choice = None


@dataclass(frozen=True)
class Mixed:
    """One tensor that an operator mixes, with its operator and its block's state."""

    expansion: Expansion
    tie: Tie
    piece: Piece

    def raw_keys(self) -> list[str]:
        on_p = self.tie.scale_of(self.piece)[1] is not None
        return [f"{self.piece.key}:n"] + [f"{self.piece.key}:p"] * on_p

    @torch.no_grad()
    def renew(self, values: Tensor, places: Tensor) -> None:
        """Take raw weights over from a slice's `values`, whose rows or columns are at `places` (-1: do not train)."""
        for key, place in zip(self.raw_keys(), self.expansion.placed_in_slice(self.piece, places), strict=False):
            place.renew_(self.expansion.raw[key], values)

    @property
    def placed(self) -> _Placed:
        return self.expansion.placed(self.piece)

    @property
    def weight(self) -> Tensor:
        return self.expansion.weight(self.piece)

    @property
    def slots(self) -> int:
        return self.piece.matrix.slots

    def raw_n(self) -> Tensor:
        return self.expansion.raw[f"{self.piece.key}:n"]

    def raw_p(self) -> Tensor | None:
        """The raw panel of P where diagonals change P; elsewhere the model's own P is raw."""
        return self.expansion.raw.get(f"{self.piece.key}:p")


def _operators(group: Sequence[Mixed]) -> list[Tensor]:
    """The operators' parameters, stacked: one for each slot of each matrix."""
    parameters = stacked([mixed.tie.operator for mixed in group])
    if all(mixed.slots == 1 for mixed in group):
        return parameters
    rows = [i for i, mixed in enumerate(group) for _ in range(mixed.slots)]
    if len(group) == 1:
        return [p.expand(len(rows), *p.shape[1:]) for p in parameters]
    index = torch.tensor(rows).to(parameters[0].device, non_blocking=True)
    return [p.index_select(0, index) for p in parameters]


def _parts(batch: Tensor, group: Sequence[Mixed]) -> list[Tensor]:
    """[n, ...] -> [slots, ...] of each matrix; views."""
    return list(batch.split([mixed.slots for mixed in group]))


def _batch(panels: Sequence[Tensor]) -> Tensor:
    """[slots, k, other] of each matrix -> [n, k, other]; the panel itself where there is one."""
    return panels[0] if len(panels) == 1 else torch.cat(list(panels))


def _raw_p(group: Sequence[Mixed]) -> Tensor:
    """Raw panels of P: [n, k, other]."""
    kept = [mixed.raw_p() for mixed in group]
    if all(panel is None for panel in kept):
        return take_all([mixed.placed.p for mixed in group], [mixed.weight for mixed in group])
    # Diagonals change P where rows are mixed, and not where columns are.
    panels = zip(group, kept, strict=True)
    return _batch([mixed.placed.p.take(mixed.weight) if panel is None else panel for mixed, panel in panels])


@torch.no_grad()
def remember(group: Sequence[Mixed]) -> tuple[Tensor, Tensor]:
    """Keep the raw weights that the model holds now; returns the panels of N and P, [n, k, other] each."""
    both = take_all([mixed.placed.both for mixed in group], [mixed.weight for mixed in group])
    k = group[0].tie.k
    n, p = both[:, :k], both[:, k:]
    # Slices train in float32, whatever the model's weights are held in.
    dtype = group[0].tie.dtype if group[0].expansion.sliced else n.dtype
    kept_n = _parts(n.to(dtype, copy=True), group)
    for mixed, *panels in zip(group, kept_n, _parts(p, group), strict=True):
        for key, panel in zip(mixed.raw_keys(), panels, strict=False):
            mixed.expansion.raw[key] = panel.to(dtype, copy=panel is panels[1])
    return n, p


@torch.no_grad()
def restore(group: Sequence[Mixed]) -> None:
    """Put raw weights into the model, for the optimizer to step on."""
    put_all([mixed.placed.n for mixed in group], [mixed.weight for mixed in group], [mixed.raw_n() for mixed in group])
    for mixed in group:
        kept = mixed.raw_p()
        if kept is not None:
            mixed.placed.p.put_(mixed.weight, kept)


@torch.no_grad()
def apply(group: Sequence[Mixed]) -> None:
    """Keep the raw weights that the model holds now and write the effective ones: W~[N] = W[N] + M W[P].

    The matrices of `group` share k, the kind of operator and the width of their panels.
    """
    if group[0].expansion.sliced:  # slices have brought the raw weights up to date
        raw_n, raw_p = _batch([mixed.raw_n() for mixed in group]), _raw_p(group)
    else:
        raw_n, raw_p = remember(group)
    effective = group[0].tie.operator.product(_operators(group), raw_p.to(group[0].tie.dtype))
    if group[0].tie.scale_n is None:
        effective.add_(raw_n)
    else:
        for mixed, more, n, p in zip(group, *(_parts(t, group) for t in (effective, raw_n, raw_p)), strict=True):
            scale_n, scale_p = mixed.tie.scale_of(mixed.piece)
            more.add_(scale_n * n)
            if scale_p is not None:
                mixed.placed.p.put_(mixed.weight, scale_p * p)
    put_all([mixed.placed.n for mixed in group], [mixed.weight for mixed in group], _parts(effective, group))


@torch.no_grad()
def pull_back(group: Sequence[Mixed], gradient: Gradients) -> None:
    """Turn gradients by effective weights into gradients by raw weights, operators and diagonals, in place.

    The matrices of `group` share k, the kind of operator and the width of their panels.
    """
    pulled = [(mixed, gradient(mixed.piece.name)) for mixed in group if not mixed.tie.by_tokens]
    group = [mixed for mixed, found in pulled if found is not None]
    if not group:
        return
    grads = [local(found[0]) for _, found in pulled if found is not None]
    places = [found[1] for _, found in pulled if found is not None]
    at_n, at_p = zip(*map(_places_in_gradient, group, places), strict=True)
    dtype = group[0].tie.dtype
    g_n = take_all(at_n, grads).to(dtype)
    raw_p = _raw_p(group).to(dtype)
    back, factors = group[0].tie.operator.pull_products(_operators(group), raw_p, g_n)
    for mixed, *parts in zip(group, *(_parts(factor, group) for factor in factors), strict=True):
        for parameter, part in zip(mixed.tie.operator.parameters(), parts, strict=True):
            accumulate(parameter, part[0] if len(part) == 1 else part.sum(0))
    if group[0].tie.scale_n is not None:
        for mixed, g, raw, grad, n, p in zip(
            group, _parts(g_n, group), _parts(raw_p, group), grads, at_n, at_p, strict=True
        ):
            _pull_back_diagonals(mixed, g, raw, grad, n, p)
    add_all(at_p, grads, _parts(back, group), partly=any(place is not None for place in places))


def _places_in_gradient(mixed: Mixed, places: Tensor | None) -> tuple[Place, Place]:
    """Where N and P lie in the gradient of the whole tensor, or of a slice of it."""
    if places is None:
        return mixed.placed.n, mixed.placed.p
    return mixed.expansion.placed_in_slice(mixed.piece, places)


def _pull_back_diagonals(mixed: Mixed, g_n: Tensor, raw_p: Tensor, grad: Tensor, n: Place, p: Place) -> None:
    """The authors' diagonals: their gradients, and those of raw weights through them."""
    tie = mixed.tie
    scale_n, scale_p = tie.scale_of(mixed.piece)
    row = tie.matrices.index(mixed.piece.matrix)
    for scale, parameter, place, g, raw in (
        (scale_n, tie.scale_n, n, g_n, mixed.raw_n()),
        (scale_p, tie.scale_p, p, None, raw_p),
    ):
        if scale is None or parameter is None:
            continue
        g = place.take(grad).to(tie.dtype) if g is None else g
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad[row] += (g * raw).sum((0, 2))
        place.put_(grad, scale * g)


def accumulate(parameter: nn.Parameter, grad: Tensor) -> None:
    """parameter.grad += grad, as autograd does it."""
    grad = grad.to(parameter.dtype)
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad


def groups_of(expansions: Sequence[Expansion], most: int) -> list[list[Mixed]]:
    """Matrices that can go through one batched product, in groups of at most `most` bytes of panels of N."""
    alike: dict[tuple[int, ...], list[Mixed]] = {}
    for expansion in expansions:
        for mixed in expansion.mixed():
            weight = expansion.weight(mixed.piece)
            other = weight.numel() // weight.shape[mixed.piece.dim]
            alike.setdefault((mixed.tie.k, other, int(mixed.tie.by_tokens)), []).append(mixed)
    groups: list[list[Mixed]] = []
    for (k, other, _), members in alike.items():
        room = 0
        for mixed in members:
            size = mixed.piece.matrix.slots * k * other * mixed.tie.dtype.itemsize
            if size > room:
                groups.append([])
                room = most
            groups[-1].append(mixed)
            room -= size
    return groups
