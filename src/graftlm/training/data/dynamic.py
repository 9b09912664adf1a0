"""Blocks of several sources whose shares change while training: a map of numbers to blocks that only the shares so far
decide, so that a resumed run finds its place again."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset

from graftlm.training.data.blocks import BlockDataset, Blocks
from graftlm.training.data.mixture import interleave

Window = tuple[int, tuple[float, ...]]
"""From which item on which weights hold."""


class DynamicBlocks(Dataset[dict[str, np.ndarray]]):
    """Map-style items in the order of their numbers. Within a window each next block comes from the source that lags
    most behind its weight (mixture.interleave: weights are shares of tokens); a source that is used up begins again, in
    another order."""

    def __init__(
        self,
        sources: Sequence[Blocks],
        sizes: Sequence[np.ndarray],
        weights: Sequence[float],
        length: int,
        seed: int,
        held_out: Sequence[BlockDataset],
    ) -> None:
        """sizes: per source the tokens of its blocks, int [n]. held_out: what each source's loss is measured on."""
        self.sources, self.sizes, self.length, self.seed = list(sources), list(sizes), length, seed
        self.held_out = list(held_out)
        self.windows: list[Window] = []
        self._picks: list[tuple[int, int]] = []
        self._coming: Iterator[tuple[int, int]] = iter(())
        total = sum(weights)
        self.set_windows([(0, tuple(weight / total for weight in weights))])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        source, block = self.pick(number)
        return self.sources[source][block].item()

    @property
    def weights(self) -> tuple[float, ...]:
        """The latest, of which the sum is one."""
        return self.windows[-1][1]

    def pick(self, number: int) -> tuple[int, int]:
        """Source and block of an item, with the windows known now."""
        if missing := number + 1 - len(self._picks):
            self._picks += itertools.islice(self._coming, max(0, missing))
        return self._picks[number]

    def begin_window(self, start: int, weights: Sequence[float]) -> None:
        """Use `weights` from item `start` on, which comes after every earlier window's."""
        assert start > self.windows[-1][0]
        self.pick(start - 1)
        del self._picks[start:]
        self.windows.append((start, tuple(weights)))
        self._coming = self._from_here()

    def set_windows(self, windows: Sequence[Window]) -> None:
        """Begin again with these."""
        self._picks, self.windows = [], [windows[0]]
        self._coming = self._from_here()
        for start, weights in windows[1:]:
            self.begin_window(start, weights)

    def _from_here(self) -> Iterator[tuple[int, int]]:
        """(source, block) of all items from the latest window's first on."""
        taken = np.bincount([source for source, _ in self._picks], minlength=len(self.sources))
        walks = [self._walk(source, int(first)) for source, first in enumerate(taken)]
        seed = self.seed + len(self.windows) - 1
        for source, (block, _) in interleave(walks, self.weights, seed, lambda element: element[1]):
            yield source, block

    def _walk(self, source: int, first: int) -> Iterator[tuple[int, int]]:
        """(block, its tokens) of a source from its `first`-th on, without end."""
        sizes = self.sizes[source]
        for turn in itertools.count(first // len(sizes)):
            order = np.random.default_rng([self.seed, source, turn]).permutation(len(sizes))
            for block in order[first % len(sizes) if turn == first // len(sizes) else 0 :]:
                yield int(block), int(sizes[block])
