"""What the trainer reads: blocks of the cache by number, or blocks that are made while training (streaming)."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from graftlm.training.data.mixture import interleave
from graftlm.training.data.packing import Block

BlockStream = Callable[[], Iterator[Block]]


class StreamedBlocks(IterableDataset[dict[str, np.ndarray]]):
    """Items of several sources, interleaved by weight. Iterating again gives the same items in the same order.

    So skipping the first n batches resumes a run exactly (it tokenises them again, and trains on none). Order is that of
    the data: shuffle the files beforehand if they are sorted. Ranks: let accelerate dispatch or shard. Loader workers
    each read everything and hand on their share.
    """

    def __init__(self, streams: Sequence[BlockStream], weights: Sequence[float], seed: int) -> None:
        self.streams, self.weights, self.seed = list(streams), list(weights), seed

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """(source, block) in order."""
        return interleave([stream() for stream in self.streams], self.weights, self.seed, len)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        worker = get_worker_info()
        for number, (_, block) in enumerate(self.blocks()):
            if worker is None or number % worker.num_workers == worker.id:
                yield block.item()


class BlockDataset(torch.utils.data.Dataset[dict[str, np.ndarray]]):
    """Map-style items: rows of `index`, int [blocks, 2] (source, block), of several sequences of blocks."""

    def __init__(self, sources: Sequence[Sequence[Block]], index: np.ndarray) -> None:
        self.sources, self.index = list(sources), index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        source, block = self.index[number]
        return self.sources[source][int(block)].item()
