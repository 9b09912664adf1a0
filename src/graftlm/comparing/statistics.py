"""What paired runs over a few seeds allow to say: differences, tokens to the same loss, and when to stop looking."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression
from scipy.stats import bootstrap, t

LEVEL = 0.95
FEWEST = 3
"""Seeds under which no interval is given."""
TOO_FEW = "too few seeds"
"""What a difference over fewer of them shows."""
NO_INTERVAL = "no interval"
"""What a difference shows whose seeds change nothing."""
SAME = 1e-12
"""Differences of scores that are apart by no more are the same, but for rounding."""
RESAMPLES = 9_999
GRID = 2_001
"""Points of log tokens at which a curve is looked at: between 0.5 and 2 times the tokens, 0.07% apart."""


def few_seeds_note(seeds: Sequence[int]) -> list[str]:
    """What to tell who compares over fewer seeds than an interval needs."""
    if len(seeds) >= FEWEST:
        return []
    return [f"seeds {list(seeds)}: too few for an interval, so none is given (at least {FEWEST})"]


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, with two intervals (None under three pairs, and of copies of one run).

    t: Student's, exact for normal differences; the one that claims rest on. bootstrap: percentiles of resampled means
    (Efron and Tibshirani 1993, section 13.3), which with n pairs is narrower than t's by more than sqrt((n - 1) / n):
    with 3 it holds the mean 76 times in 100 rather than 95 (simulated).
    """

    n: int
    mean: float
    t_interval: tuple[float, float] | None
    bootstrap_interval: tuple[float, float] | None

    @property
    def shown(self) -> str:
        """What the t interval shows: `lower`, `higher`, `no difference shown`; without one `too few seeds`, or `no
        interval` where the seeds change nothing."""
        if self.t_interval is None:
            return TOO_FEW if self.n < FEWEST else NO_INTERVAL
        low, high = self.t_interval
        return "lower" if high < 0 else "higher" if low > 0 else "no difference shown"


def are_copies(losses: Sequence[float]) -> bool:
    """Whether runs of several seeds are one run several times: their losses are the same, bit for bit."""
    return len(losses) > 1 and len(set(losses)) == 1


def difference(differences: Sequence[float], *, copies: bool = False) -> Difference:
    """Mean and 95% intervals of paired differences, one a seed. copies: of one run (are_copies), which are no sample:
    no interval. Nor is there one where all are the same, as scores of few questions may be: it would have no width, and
    claim what nobody knows."""
    values = np.asarray(differences, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    if n < FEWEST or copies or np.ptp(values) <= SAME:
        return Difference(n, mean, None, None)
    half = half_width(values, 1 - LEVEL)
    resampled = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=0
    ).confidence_interval
    return Difference(n, mean, (mean - half, mean + half), (float(resampled.low), float(resampled.high)))


def half_width(values: np.ndarray, error: float) -> float:
    """Half of Student's two-sided interval for the mean of `values` [n], wrong with probability `error`."""
    n = len(values)
    return float(t.ppf(1 - error / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))


# --- tokens to the same loss -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needed:
    """How many times an arm's tokens plain training needs to reach the arm's loss.

    A figure that lies outside of the multiples that were run is the nearest of them, and `outside` says on which side;
    of an open interval the end is None.
    """

    n: int
    multiple: float
    outside: str
    """`below`, `above`, or empty."""
    interval: tuple[float | None, float | None] | None
    """None with fewer than three seeds, or where these are copies of one run."""
    smallest: float
    largest: float

    @property
    def text(self) -> str:
        """`1.38 (1.12 to > 2)`."""
        low, high = f"< {self.smallest:.3g}", f"> {self.largest:.3g}"
        middle = {"below": low, "above": high, "": f"{self.multiple:.2f}"}[self.outside]
        if self.interval is None:
            return middle
        ends = (
            low if self.interval[0] is None else f"{self.interval[0]:.2f}",
            high if self.interval[1] is None else f"{self.interval[1]:.2f}",
        )
        return f"{middle} ({ends[0]} to {ends[1]})"


def tokens_needed(arm: Sequence[float], multiples: np.ndarray, plain: np.ndarray) -> Needed:
    """Where plain training's loss at the end of a whole schedule, as a function of log tokens, meets an arm's.

    arm: [seeds] its losses. multiples: [seeds, lengths] tokens of plain training's runs over the arm's, ascending.
    plain: [seeds, lengths] their losses.

    Point: the seeds' mean curve, made monotone (isotonic regression) and interpolated by PCHIP (Fritsch and Carlson
    1980), which adds no wiggle; the fewest tokens at which it is as low as the arm's mean. Interval: all multiples at
    which a paired t test over seeds of arm minus plain does not reject a difference of 0 (Fieller's way: a confidence
    set by inverting a test), each seed's curve interpolated. Nothing is extrapolated.
    """
    losses = np.asarray(arm, dtype=np.float64)
    logs = np.log(np.asarray(multiples, dtype=np.float64))
    low, high = float(logs[:, 0].max()), float(logs[:, -1].min())
    grid = np.linspace(low, high, GRID)
    mean = PchipInterpolator(logs.mean(axis=0), isotonic_regression(plain.mean(axis=0), increasing=False).x)(grid)
    at, outside = _first_at_or_below(grid, mean, float(losses.mean()))
    smallest, largest = math.exp(low), math.exp(high)
    if len(losses) < FEWEST:
        return Needed(len(losses), math.exp(at), outside, None, smallest, largest)
    curves = np.stack([PchipInterpolator(x, y)(grid) for x, y in zip(logs, plain, strict=True)])  # [seeds, GRID]
    gaps = losses[:, None] - curves
    halves = t.ppf((1 + LEVEL) / 2, len(losses) - 1) * gaps.std(axis=0, ddof=1) / math.sqrt(len(losses))
    kept = grid[np.abs(gaps.mean(axis=0)) <= halves]
    first, last = min([at, *kept[:1]]), max([at, *kept[-1:]])
    ends = (None if first <= low else math.exp(first), None if last >= high else math.exp(last))
    if not len(kept) and outside:  # the whole interval lies beyond what was run
        return Needed(len(losses), math.exp(at), outside, _beyond(outside, smallest, largest), smallest, largest)
    return Needed(len(losses), math.exp(at), outside, ends, smallest, largest)


def _beyond(outside: str, smallest: float, largest: float) -> tuple[float | None, float | None]:
    return (None, smallest) if outside == "below" else (largest, None)


def _first_at_or_below(grid: np.ndarray, curve: np.ndarray, loss: float) -> tuple[float, str]:
    """Least point of `grid` at which the falling `curve` is `loss`, and on which side it is missing."""
    reached = np.flatnonzero(curve <= loss)
    if not len(reached):
        return float(grid[-1]), "above"
    index = int(reached[0])
    if index == 0:
        return float(grid[0]), "" if curve[0] == loss else "below"
    before, after = curve[index - 1], curve[index]
    share = (before - loss) / (before - after)
    return float(grid[index - 1] + share * (grid[index] - grid[index - 1])), ""


# --- looking again after every pair ----------------------------------------------------------------------------------


def repeated_interval(differences: Sequence[float], looks: int) -> tuple[float, float] | None:
    """Interval for the mean of paired differences that holds at all of `looks` planned looks at once.

    A repeated confidence interval (Jennison and Turnbull 1989, JRSS B 51, 305-361): at each look Student's interval
    with an equal part of the error (Bonferroni), so with probability LEVEL every one of them holds the true mean,
    whichever look one stops at and why. For normal differences, at any number of pairs. None under three, and where all
    are the same (see `difference`).
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < FEWEST or np.ptp(values) <= SAME:
        return None
    mean, half = float(values.mean()), half_width(values, (1 - LEVEL) / looks)
    return mean - half, mean + half
