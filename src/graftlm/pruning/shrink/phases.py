"""How large the model is after each phase, and which steps the phase trains: arithmetic, without a model."""

import math
from dataclasses import dataclass

from graftlm.errors import UserError

REMOVED = 0.05
"""About how much of the model one phase removes (section 4.2, fig. 4)."""


@dataclass(frozen=True)
class Phase:
    """One round of pruning and training."""

    number: int
    """From 1."""
    parameters: int
    """Of the model after pruning, at most."""
    first: int
    """Steps of the whole run taken before it."""
    end: int
    """Steps of the whole run taken after it."""

    @property
    def steps(self) -> int:
        return self.end - self.first

    @property
    def name(self) -> str:
        return f"phase_{self.number:02d}"


def default_interleaves(original: int, target: int) -> int:
    """As many phases as take about 5% of the model each: 20 from 350 to 125 million."""
    return max(1, round(math.log(target / original) / math.log(1 - REMOVED)))


def phases_of(
    original: int,
    target: int,
    steps: int,
    *,
    interleaves: int | None,
    schedule: str,
    shares: str,
    step_tokens: int | None = None,
) -> tuple[Phase, ...]:
    """The phases from `original` to `target` parameters over `steps` optimizer steps (section 3.2, algorithm 1).

    step_tokens: tokens of a step, where tokens were asked for and `steps` follow from them.

    Raises UserError for a target above the original, and for fewer steps than every phase gets one of.
    """
    if target > original:
        raise UserError(
            f"target_parameters: {target:,} is above the model's {original:,}; shrinking only takes away, so give less"
        )
    count = interleaves or default_interleaves(original, target)
    needed = least_steps(count, shares)
    if steps < needed:
        key, each, size = ("max_steps", "", 1) if step_tokens is None else ("tokens", f" of {step_tokens}", step_tokens)
        raise UserError(
            f"{key}: {steps} steps{each} are too few for {count} phases with {shares} shares, of which the smallest "
            f"gets none; give at least {needed * size}, or fewer interleaves"
        )
    ends = ends_of(steps, count, shares)
    sizes = sizes_of(original, target, count, schedule)
    return tuple(
        Phase(i + 1, size, first, end)
        for i, (size, first, end) in enumerate(zip(sizes, [0, *ends], ends, strict=False))
    )


def sizes_of(original: int, target: int, count: int, schedule: str) -> list[int]:
    """Parameters after each phase; the last is exactly `target`.

    geometric: original (target / original)^(i / count); linear: as many less each time.
    """
    between = range(1, count)
    if schedule == "geometric":
        sizes = [round(original * (target / original) ** (i / count)) for i in between]
    else:
        sizes = [round(original + (target - original) * i / count) for i in between]
    return [*sizes, target]


def ends_of(steps: int, count: int, shares: str) -> list[int]:
    """Steps taken when each phase ends. growing: the i-th of T, from 0, has the share 2 (i + 1) / (T (T + 1)), so that
    i phases have i (i + 1) / (T (T + 1)) together (eq. 11)."""
    if shares == "growing":
        return [round(steps * i * (i + 1) / (count * (count + 1))) for i in range(1, count + 1)]
    return [round(steps * i / count) for i in range(1, count + 1)]


def least_steps(count: int, shares: str) -> int:
    """The fewest steps of which every phase gets one. growing: that is where the first phase's share is above half a
    step, which makes every other's more than a whole one."""
    return count * (count + 1) // 4 + 1 if shares == "growing" else count
