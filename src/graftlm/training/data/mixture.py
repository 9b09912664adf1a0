"""Several sources in one stream of blocks, by weight.

Each source is packed on its own and whole blocks are interleaved. So a source's blocks do not depend on what it is
mixed with: its cache serves every mixture and every set of weights, and no block mixes sources by accident. Weights are
shares of TOKENS, not of blocks or documents. An epoch ends when the first source has no block left; from the others it
takes what their weights allow: a random sample of their blocks, and the next epoch goes on with the others (map-style),
or their beginning (streaming). So every source must have a block, which those who call see to. Without weights an epoch
is every block of every source (map-style).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def interleave(
    streams: Sequence[Iterator[T]], weights: Sequence[float], seed: int, size: Callable[[T], int]
) -> Iterator[tuple[int, T]]:
    """Yield (number of the stream, its next element) until one stream has ended; deterministic.

    The next element always comes from the stream that lags most behind its share, so that the realised shares of
    `size` are within one element of the weights at any point. The seed only sets where the rhythm begins.
    """
    behind = np.random.default_rng(seed).random(len(streams))
    taken = np.zeros(len(streams))
    wanted = np.asarray(weights, float)
    while True:
        source = int(np.argmin((taken - behind) / wanted))
        try:
            element = next(streams[source])
        except StopIteration:
            return
        taken[source] += size(element)
        yield source, element


def mixed_index(sizes: Sequence[np.ndarray], weights: Sequence[float | None], seed: int) -> np.ndarray:
    """The order of an epoch over several sources, int32 [blocks, 2]: source and block.

    sizes: per source the tokens of its blocks, int [n]. Of each source a seeded permutation is walked.
    """
    given = [weight for weight in weights if weight is not None]
    if len(sizes) == 1 or not given:
        source = np.repeat(np.arange(len(sizes), dtype=np.int32), [len(size) for size in sizes])
        return np.stack([source, np.concatenate([np.arange(len(size), dtype=np.int32) for size in sizes])], axis=1)
    walks = [_walk(size, [seed, source]) for source, size in enumerate(sizes)]
    picked = [(source, block) for source, (block, _) in interleave(walks, given, seed, lambda element: element[1])]
    return np.asarray(picked, np.int32).reshape(-1, 2)


def index_of_epoch(first: np.ndarray, lengths: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """The order of a later epoch (from 0) of a weighted mixture, int32 [blocks, 2], given that of the first: as many
    blocks of every source in the same rhythm, but the ones that come next on its walk, which begins again, in another
    order, when all have been taken. Blocks of unequal length make its shares of tokens a little other than the first's.

    lengths: blocks of each source.
    """
    index = first.copy()
    for source, length in enumerate(lengths):
        rows = np.flatnonzero(first[:, 0] == source)
        laps, places = np.divmod(epoch * len(rows) + np.arange(len(rows)), max(1, length))
        for lap in np.unique(laps):
            walk = np.random.default_rng([seed, source, *([int(lap)] if lap else [])]).permutation(length)
            index[rows[laps == lap], 1] = walk[places[laps == lap]]
    return index


def _walk(sizes: np.ndarray, seed: list[int]) -> Iterator[tuple[int, int]]:
    """(block, its tokens) in a seeded order."""
    for block in np.random.default_rng(seed).permutation(len(sizes)):
        yield int(block), int(sizes[block])
