"""Importance of components over iterations: one iteration sees few tokens, and a component that they do not use is weak
only by chance."""

from collections.abc import Mapping

from torch import Tensor


class Remembered:
    """Scores of the components that are left, summed over iterations with weights memory^age.

    memory: 0: an iteration's own scores alone, as published; 1: all iterations count alike.
    """

    def __init__(self, memory: float):
        self._memory = memory
        self._sums: dict[str, Tensor] = {}

    def add(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The sums with this iteration's `scores` among them, by block name: float [components].

        Each iteration's scores are divided by their mean in the block: gradients grow as a model breaks, and the last
        iterations would drown the others.
        """
        if self._memory == 0:
            return scores
        sums: dict[str, Tensor] = {}
        for name, now in scores.items():
            mean = now.mean()
            sums[name] = now / mean if mean > 0 else now
            if name in self._sums:
                sums[name] = sums[name] + self._memory * self._sums[name]
        self._sums = sums
        return sums

    def keep(self, chosen: Mapping[str, Tensor]) -> None:
        """Only the components `chosen` are left, by block name: int64 [n], ascending; other blocks are as they were."""
        for name, ids in chosen.items():
            if name in self._sums:
                self._sums[name] = self._sums[name][ids.to(self._sums[name].device)]
