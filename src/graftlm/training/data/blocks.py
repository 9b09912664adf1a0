"""A source's blocks, and the map-style dataset over the blocks of several sources."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset

from graftlm.training.config import SourceConfig
from graftlm.training.data.packing import Block
from graftlm.training.data.statistics import Counts


class Blocks(Protocol):
    """Blocks by number: a list, or a file of the cache."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Block: ...


@dataclass(frozen=True)
class SourceBlocks:
    """A source's training blocks and its evaluation blocks."""

    train: Blocks
    train_sizes: np.ndarray
    """int32 [blocks, 2]: tokens and supervised tokens"""
    evaluation: Blocks
    evaluation_numbers: np.ndarray
    """int [n]: which of them"""
    counts: Counts


class BlockDataset(Dataset[dict[str, np.ndarray]]):
    """Map-style items: rows of `index`, int [blocks, 2] (source, block), of several sequences of blocks."""

    def __init__(
        self, sources: Sequence[Blocks], index: np.ndarray, of_epoch: Callable[[int], np.ndarray] | None = None
    ) -> None:
        """of_epoch: index of an epoch (from 0), of as many rows; None: all are alike."""
        self.sources, self.index = list(sources), index
        self._of_epoch = of_epoch

    def set_epoch(self, epoch: int) -> None:
        """Show what an epoch (from 0) is trained on."""
        if self._of_epoch is not None:
            self.index = self._of_epoch(epoch)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        source, block = self.index[number]
        return self.sources[source][int(block)].item()


def evaluation_dataset(
    sources: Sequence[SourceBlocks], configs: Sequence[SourceConfig], max_blocks: int
) -> BlockDataset | None:
    """At most max_blocks blocks: of each source a part in proportion to its weight (without weights: to what there is
    of it), spread evenly over it."""
    weights = [
        len(source.evaluation_numbers) if config.weight is None else config.weight
        for source, config in zip(sources, configs, strict=True)
    ]
    total = sum(weights) or 1
    rows = []
    for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        available = source.evaluation_numbers
        count = min(len(available), max(1, round(max_blocks * weight / total)))
        picked = available[np.linspace(0, len(available) - 1, count).round().astype(int)] if count else available
        rows.append(np.stack([np.full(count, number), picked], axis=1))
    index = np.concatenate(rows)[:max_blocks]
    return BlockDataset([source.evaluation for source in sources], index) if len(index) else None


def not_evaluated(
    sources: Sequence[SourceBlocks], configs: Sequence[SourceConfig], evaluation: BlockDataset | None
) -> list[str]:
    """A note on sources of which evaluation_dataset has taken nothing, though something is held out."""
    there = set(evaluation.index[:, 0]) if evaluation is not None else set()
    paths = [
        config.path
        for number, (source, config) in enumerate(zip(sources, configs, strict=True))
        if len(source.evaluation_numbers) and number not in there
    ]
    if not paths:
        return []
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return [f"nothing of {paths[0]}{more} is evaluated, for eval_max_blocks is small; raise it"]
