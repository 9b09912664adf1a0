"""What a pilot's pairs say: pays, does not, undecided; and what it would have said on runs that exist."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftlm.comparing.statistics import FEWEST, repeated_interval
from graftlm.errors import UserError

MINIMUM_EFFECT = 0.002
"""Nats per token: a fifth of a percent of perplexity."""
PAIRS = 5
FASTER = 1.5
"""Times the control's learning rate: the second control, which a method has to be ahead of, too. Whatever moves weights
further a step is ahead at first (experiments/pilot)."""


@dataclass(frozen=True)
class Verdict:
    """What a pilot says so far."""

    answer: str
    """`pays`, `does not`, or `undecided`."""
    pairs: int
    """Looked at when it was given."""
    gain: float | None
    """Mean of control minus method, nats per token: above 0 the method is better."""
    interval: tuple[float, float] | None
    """Holds the true mean with 95%, whichever look the pilot stopped at."""
    over_faster: float | None = None
    """Mean of the faster control minus method, over the first pairs; None where the pairs alone said `does not`."""
    over_faster_interval: tuple[float, float] | None = None
    """Holds the true mean with 95%."""


def judge(gains: Sequence[float], *, minimum_effect: float = MINIMUM_EFFECT, pairs: int = PAIRS) -> Verdict:
    """The answer after these pairs, of at most `pairs`, looked at from the third on.

    gains: control minus method of each pair. It pays when the whole interval lies above `minimum_effect`, it does not
    when the whole interval lies below; `statistics.repeated_interval` holds at all looks together.
    """
    interval = repeated_interval(gains, looks=pairs - FEWEST + 1)
    return Verdict(_answer(interval, minimum_effect), len(gains), sum(gains) / len(gains) if gains else None, interval)


def check(verdict: Verdict, over_faster: Sequence[float], *, minimum_effect: float = MINIMUM_EFFECT) -> Verdict:
    """The answer after the faster control, of a verdict that was not `does not`.

    over_faster: faster control minus method of the first FEWEST pairs. Training at a higher rate is ahead after a few
    steps, whatever it does in the end: a method that is ahead by no more than that does not pay, whether it is ahead of
    the control or that is not clear.
    """
    interval = repeated_interval(over_faster, looks=1)
    mean = sum(over_faster) / len(over_faster)
    answer = _of_both([verdict.answer, _answer(interval, minimum_effect)])
    return replace(verdict, answer=answer, over_faster=mean, over_faster_interval=interval)


def to_check(verdict: Verdict) -> bool:
    """Whether the faster control can still change the answer; False, too, for pairs that give no interval."""
    return verdict.answer != "does not" and verdict.interval is not None


def replay(
    gains: Sequence[float],
    over_faster: Sequence[float],
    *,
    minimum_effect: float = MINIMUM_EFFECT,
    pairs: int = PAIRS,
) -> Verdict:
    """What a pilot would have said on pairs that have been run already (control minus method, and faster control minus
    method, in order): it stops at the first clear look, and sees no more than `pairs` of them. Fewer than FEWEST of the
    faster control: the answer without it."""
    verdict = judge([], minimum_effect=minimum_effect, pairs=pairs)
    for count in range(1, min(pairs, len(gains)) + 1):
        verdict = judge(gains[:count], minimum_effect=minimum_effect, pairs=pairs)
        if verdict.answer != "undecided":
            break
    if to_check(verdict) and len(over_faster) >= FEWEST:
        verdict = check(verdict, over_faster[:FEWEST], minimum_effect=minimum_effect)
    return verdict


def _of_both(answers: Collection[str]) -> str:
    """It pays if it is ahead of both controls, and does not if it is not ahead of one."""
    return next(answer for answer in ("does not", "undecided", "pays") if answer in answers)


def _answer(interval: tuple[float, float] | None, minimum_effect: float) -> str:
    """`pays` or `does not` where the whole interval of a gain says so."""
    if interval is None or interval[0] <= minimum_effect <= interval[1]:
        return "undecided"
    return "pays" if interval[0] > minimum_effect else "does not"


@dataclass(frozen=True)
class Replayed:
    """One committed experiment: what a pilot on its short runs says, and what its long runs say."""

    name: str
    verdict: Verdict
    truth: str
    """Of the long runs, by whole 95% t intervals: `pays` (ahead of both controls), `does not`, or `undecided`."""

    @property
    def right(self) -> bool | None:
        """Whether the pilot said what the long runs say; None where these say nothing themselves."""
        return None if self.truth == "undecided" else self.verdict.answer == self.truth


def replay_comparison(
    short: Mapping[str, Any],
    long: Mapping[str, Any],
    *,
    faster: str,
    minimum_effect: float = MINIMUM_EFFECT,
    pairs: int = PAIRS,
) -> list[Replayed]:
    """Replay a pilot for every arm that two comparisons (comparison.json) have in common: one of short runs, whose
    differences are the pilot's pairs in the order of their seeds, and one of long runs, which say what is true.

    faster: name of the arm of plain training at FASTER times the rate, in both.
    """
    early, late = _gains(short), _gains(long)
    found = []
    for name in early:
        if name != faster and name in late:
            verdict = replay(
                list(early[name].values()),
                _over(early[name], early[faster]),
                minimum_effect=minimum_effect,
                pairs=pairs,
            )
            gains = (list(late[name].values()), _over(late[name], late[faster]))
            answers = {_answer(repeated_interval(one, looks=1), minimum_effect) for one in gains}
            found.append(Replayed(name, verdict, _of_both(answers)))
    return found


def _gains(comparison: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Control minus arm, by seed, of every arm that has been run. Raises UserError where arms have several controls."""
    arms = [arm for arm in comparison["arms"] if arm.get("difference")]
    if len(controls := {arm["matched"] for arm in arms}) > 1:
        raise UserError(f"the arms have several controls ({', '.join(sorted(controls))}), which a pilot has not")
    return {arm["name"]: {seed: -gap for seed, gap in arm["difference"]["by_seed"].items()} for arm in arms}


def _over(gains: Mapping[str, float], faster: Mapping[str, float]) -> list[float]:
    """Faster control minus arm, from control minus arm and control minus faster control, of seeds that both have."""
    return [gain - faster[seed] for seed, gain in gains.items() if seed in faster]
