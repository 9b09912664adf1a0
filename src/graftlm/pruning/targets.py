"""How many components each block keeps, so that the model lands on its target: the nearest below it.

A step is what may be taken or left at once: a component; `width_multiple` channels; that in every layer when uniform.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from torch import nn

from graftlm.anatomy import KINDS, Block, Kind, decoder_layers
from graftlm.errors import UserError
from graftlm.parts import component_cost, count_parameters, layer_parameters
from graftlm.pruning.per_layer_modeling import output_biases
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.surgery import prunable_blocks
from graftlm.pruning.ways import WAYS

SLACK = 1e-9
"""Of a number of components in floats: 10 (1 - 0.9) is a little under 1."""


@dataclass(frozen=True)
class Sizes:
    """The blocks of one kind: lists over blocks, in the order of `names`."""

    kind: Kind
    names: tuple[str, ...]
    counts: tuple[int, ...]
    """Components of the original."""
    costs: tuple[int, ...]
    """Parameters of one component."""
    step: int
    """Components are kept in multiples of this."""
    least: tuple[int, ...]
    """Components that must stay."""

    @property
    def most(self) -> tuple[int, ...]:
        """Components that may stay: whole steps of the original's."""
        return tuple(count // self.step * self.step for count in self.counts)

    def parameters(self, counts: Sequence[int]) -> int:
        return sum(count * cost for count, cost in zip(counts, self.costs, strict=True))

    @cached_property
    def one_step(self) -> int:
        """Parameters of a step in one block, the dearest."""
        return self.step * max(self.costs)


def sizes_of(model: nn.Module, settings: PruneSettings) -> tuple[Sizes, ...]:
    """What there is to prune, heads first. UserError where a layer cannot keep what the settings ask for."""
    blocks = prunable_blocks(model)
    found = []
    for kind in KINDS:
        own = [block for block in blocks if block.kind == kind]
        if own:
            found.append(_sizes(model, kind, own, settings))
    return tuple(found)


def _sizes(model: nn.Module, kind: Kind, blocks: Sequence[Block], settings: PruneSettings) -> Sizes:
    step = 1 if kind == "heads" else settings.width_multiple
    floor = settings.min_groups if kind == "heads" else -(-settings.min_channels // step) * step
    for block in blocks:
        if floor > block.components // step * step:
            what, why = "key-value groups", "min_groups"
            if kind == "channels":
                what, why = "channels", f"min_channels {settings.min_channels}, width_multiple {step}"
            raise UserError(
                f"prune: layer {block.layer} has {block.components} {what}, and must keep {floor} ({why}); ask for less"
            )
    return Sizes(
        kind,
        tuple(block.name for block in blocks),
        tuple(block.components for block in blocks),
        tuple(component_cost(model, block) for block in blocks),
        step,
        (floor,) * len(blocks),
    )


@dataclass(frozen=True)
class Target:
    """What the pruned model is to be: parameters of components that may stay, in all and by kind."""

    sizes: tuple[Sizes, ...]
    original: int
    """Parameters of the components of the original."""
    budget: int
    """Of the components that stay, at most."""
    by_kind: tuple[int, ...]
    """The budget divided: heads and channels lose the same share as nearly as whole steps allow."""
    sparsity: float
    """Share of the components that goes: what the budget comes to; as published, what was asked for (the budget's is
    rounded, and would take a component more of every block)."""

    def budget_at(self, kind: int, iteration: int, iterations: int) -> int:
        """Parameters of components of that kind at the end of an iteration: from all to the target in even steps."""
        whole = self.sizes[kind].parameters(self.sizes[kind].counts)
        return whole - (whole - self.by_kind[kind]) * iteration // iterations


def parameters_left(model: nn.Module, sparsity: float) -> int:
    """Parameters of the whole model when `sparsity` of those of all heads and channels has gone, rounded down."""
    components = sum(block.components * component_cost(model, block) for block in prunable_blocks(model))
    left = math.floor(components * (1 - Fraction(str(sparsity))))  # in decimals, as it was written
    return count_parameters(model) - components + left


def asked_parameters(model: nn.Module, settings: PruneSettings) -> int:
    """Parameters that the pruned model has at most, whatever it is pruned of. A sparsity asks for the same number of
    every method: the model without that share of its heads' and channels' parameters.

    Raises UserError for a target above the model.
    """
    if settings.target_parameters is None:
        assert settings.sparsity is not None
        return parameters_left(model, settings.sparsity)
    total = count_parameters(model)
    if settings.target_parameters > total:
        raise UserError(
            f"prune: target_parameters {settings.target_parameters:,} is above the model's {total:,}; ask for less"
        )
    return settings.target_parameters


def check_size(model: nn.Module, settings: PruneSettings) -> None:
    """Raise UserError for a size that `model` cannot be pruned to, as far as its shapes tell."""
    wanted = asked_parameters(model, settings)
    if WAYS[settings.method].components:
        find_target(model, settings, uniform=bool(settings.uniform))
    elif settings.method == "shortgpt" and settings.exact:
        _check_layers(model, wanted)


def _check_layers(model: nn.Module, wanted: int) -> None:
    """Raise UserError where so few parameters are less than one layer leaves."""
    sizes = layer_parameters(model)
    least = count_parameters(model) - sum(sizes) + min(sizes)
    if wanted < least:
        raise UserError(
            f"prune: shortgpt keeps one layer at least, which leaves {least:,} parameters, above the {wanted:,} asked "
            "for; ask for more"
        )


def _added_biases(model: Any, settings: PruneSettings) -> int:
    """Parameters that flap's compensation adds: two biases a layer, where there are none yet. As published they do not
    count."""
    if settings.method != "flap" or not (settings.flap_compensation and settings.exact):
        return 0
    biases = [bias for layer in decoder_layers(model)[1] for bias in output_biases(layer)]
    hidden: int = model.config.hidden_size
    return hidden * sum(bias is None for bias in biases)


def find_target(model: nn.Module, settings: PruneSettings, *, uniform: bool) -> Target:
    """What `settings` ask for; what the pruning adds is to be saved besides.

    Raises UserError for a target above the original and for one that the floors forbid.
    """
    sizes = sizes_of(model, settings)
    if not sizes:
        raise UserError("prune: the model has no heads and no channels left to remove; start from one that has")
    total, biases = count_parameters(model), _added_biases(model, settings)
    original = sum(one.parameters(one.counts) for one in sizes)
    budget = asked_parameters(model, settings) - (total - original) - biases
    least = sum(one.parameters(one.least) for one in sizes)
    if budget < least:
        left = total - original + least + biases
        most = _floored((total - left) / original)
        counted = f" ({biases:,} of them biases, which flap_compensation: false leaves out)" if biases else ""
        raise UserError(
            f"prune: {_asked(settings)} is more than can go: at most sparsity {most}, which leaves {left:,} of "
            f"{total:,} parameters{counted}; ask for less, or lower min_groups, min_channels or width_multiple"
        )
    by_kind = _divided(sizes, budget, budget / original, uniform, settings.least_parameters)
    asked = None if settings.exact else settings.sparsity
    return Target(sizes, original, budget, by_kind, 1 - budget / original if asked is None else asked)


def _floored(share: float) -> float:
    """With four digits, never more than it is."""
    return math.floor(share * 1e4) / 1e4


def _asked(settings: PruneSettings) -> str:
    if settings.sparsity is not None:
        return f"sparsity {settings.sparsity}"
    return f"target_parameters {settings.target_parameters:,}"


def _divided(
    sizes: tuple[Sizes, ...], budget: int, share: float, uniform: bool, floors: tuple[int, ...]
) -> tuple[int, ...]:
    """Budgets of the kinds: heads keep the share nearest to `share` with which channels can fill up the rest.

    floors: PruneSettings.least_parameters. Where heads cannot lose a whole group yet, channels would lose more than a
    later pruning leaves of them, and what they have lost cannot make up for that group then.
    """
    if len(sizes) == 1:
        return (budget,)
    heads, channels = sizes
    low, high = channels.parameters(channels.least), channels.parameters(channels.most)
    step = channels.one_step * (len(channels.names) if uniform else 1)
    wanted = share * heads.parameters(heads.counts)
    best: tuple[int, int, float, int] | None = None
    for spent in _reachable(heads, uniform):
        rest = budget - spent
        if rest < low:
            break
        under = sum(max(0, floor - own) for floor, own in zip(floors, (spent, rest), strict=False))
        missed = max(0, rest - high - step + 1)  # parameters below the budget that channels cannot make up
        key = (under, missed, abs(spent - wanted), spent)
        if best is None or key < best:
            best = key
    assert best is not None  # all at their least fits: find_target has checked
    return best[3], budget - best[3]


def _reachable(sizes: Sizes, uniform: bool) -> list[int]:
    """Parameters that a kind may hold, ascending: from all blocks at their least to all whole."""
    if uniform:
        each = range(min(sizes.least), max(sizes.most) + 1, sizes.step)
        return [sizes.parameters(_level(count, sizes.least, sizes.most)) for count in each]
    counts, found = list(sizes.least), [sizes.parameters(sizes.least)]
    for i, most in enumerate(sizes.most):
        while counts[i] < most:
            counts[i] += sizes.step
            found.append(found[-1] + sizes.step * sizes.costs[i])
    return found


def _level(count: int, least: Sequence[int], most: Sequence[int]) -> tuple[int, ...]:
    """The same `count` for every block, or the nearest that it may have."""
    return tuple(min(max(count, a), b) for a, b in zip(least, most, strict=True))


def apportioned(sizes: Sizes, now: Sequence[int], sparsity: Sequence[float] | None, budget: int) -> tuple[int, ...]:
    """Components that each block keeps: their parameters are at most `budget`, and less than a step below it where the
    bounds allow.

    Every block's share is 1 - sparsity, all shifted alike until they sum to the budget, between its floor and what it
    has `now`; then whole steps, the largest remainders rounded up.

    sparsity: of every block; None: every block keeps the same number, or all it has where that is less.
    """
    most = [count // sizes.step * sizes.step for count in now]
    least = [min(a, b) for a, b in zip(sizes.least, most, strict=True)]
    if sparsity is None:
        each = range(0, max(most) + 1, sizes.step)
        fitting = bisect_right(each, budget, key=lambda count: sizes.parameters(_level(count, least, most)))
        return _level(each[max(0, fitting - 1)], least, most)

    def shifted(by: float) -> list[float]:
        wanted = (count * (1 - s + by) for count, s in zip(sizes.counts, sparsity, strict=True))
        return [min(max(w, a), b) for w, a, b in zip(wanted, least, most, strict=True)]

    low, high = -2.0, 2.0
    for _ in range(60):  # bisection: the sum grows with the shift
        middle = (low + high) / 2
        spent = sum(w * cost for w, cost in zip(shifted(middle), sizes.costs, strict=True))
        low, high = (middle, high) if spent <= budget else (low, middle)
    wanted = shifted(low)
    counts = [int(w + SLACK) // sizes.step * sizes.step for w in wanted]
    left = budget - sizes.parameters(counts)
    order = sorted(range(len(counts)), key=lambda i: counts[i] - wanted[i])  # the largest remainder first
    changed = True
    while changed:
        changed = False
        for i in order:
            if counts[i] + sizes.step <= most[i] and sizes.step * sizes.costs[i] <= left:
                counts[i] += sizes.step
                left -= sizes.step * sizes.costs[i]
                changed = True
    return tuple(counts)


def published(sizes: Sizes, now: Sequence[int], sparsity: Sequence[float]) -> tuple[int, ...]:
    """Components that each block keeps by the authors' code: int(n (1 - s)), floored, whatever their sum."""
    shares = zip(sizes.counts, sparsity, strict=True)
    wanted = [int(count * (1 - s) + SLACK) // sizes.step * sizes.step for count, s in shares]
    return tuple(min(max(w, a), b) for w, a, b in zip(wanted, sizes.least, now, strict=True))


def counts_of(model: nn.Module, sizes: Sizes) -> tuple[int, ...]:
    """Components that `model`, pruned or not, has in every block of `sizes`."""
    there: Mapping[str, int] = {block.name: block.components for block in prunable_blocks(model)}
    return tuple(there.get(name, 0) for name in sizes.names)
