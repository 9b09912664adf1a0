"""From token streams to blocks of at most max_length, one document at a time, so that memory stays constant.

The same packers serve the cache and the stream. `add` and `finish` yield the blocks that are ready.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from graftlm.samples import IGNORED
from graftlm.training.data.encode import Encoded
from graftlm.training.data.statistics import Counts

OPEN_BLOCKS = 64
"""Blocks that best-fit packing keeps open at a time."""
MIN_TOKENS = 2
"""A shorter block predicts nothing."""


@dataclass(frozen=True)
class Block:
    """One training sequence."""

    input_ids: np.ndarray
    """int32 [n]"""
    supervised: np.ndarray | None
    """bool [n]; None: all"""
    starts: np.ndarray | None
    """int32: where documents that must not see each other begin, 0 included; None: the block is one sequence"""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labels(self) -> np.ndarray:
        """int64 [n]. The model predicts label i from token i - 1, so the first token of every document is left out: at
        the block's start nothing predicts it, elsewhere the document before would."""
        labels = self.input_ids.astype(np.int64)
        if self.supervised is not None:
            labels[~self.supervised] = IGNORED
        labels[0] = IGNORED
        if self.starts is not None:
            labels[self.starts] = IGNORED
        return labels

    @property
    def supervised_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def position_ids(self) -> np.ndarray | None:
        """int64 [n], from 0 in every document: what keeps them apart in attention. None where nothing must be."""
        if self.starts is None:
            return None
        lengths = np.diff(np.append(self.starts, len(self)))
        return np.arange(len(self), dtype=np.int64) - np.repeat(self.starts, lengths)

    def item(self) -> dict[str, np.ndarray]:
        """The model's inputs: input_ids, labels and, where documents are kept apart, position_ids; int64 [n] each."""
        item = {"input_ids": self.input_ids.astype(np.int64), "labels": self.labels}
        positions = self.position_ids
        return item if positions is None else item | {"position_ids": positions}


class TextPacker:
    """Fills blocks with consecutive documents; a document goes on in the next block.

    The last block is shorter, and is kept if it has 2 tokens. boundaries: documents of a block do not see each other
    (one that goes on from the block before starts again at position 0). separate: no document shares a block, so the
    last block of each is shorter.
    """

    def __init__(self, max_length: int, *, boundaries: bool = False, separate: bool = False) -> None:
        self.max_length, self.boundaries, self.separate = max_length, boundaries, separate
        self._parts: list[np.ndarray] = []
        self._starts = [0]
        self._filled = 0

    def add(self, encoded: Encoded) -> Iterator[Block]:
        ids = encoded.input_ids
        if self.boundaries and encoded.first and self._filled:
            self._starts.append(self._filled)
        at = 0
        while at < len(ids):
            part = ids[at : at + self.max_length - self._filled]
            self._parts.append(part)
            self._filled += len(part)
            at += len(part)
            if self._filled == self.max_length:
                yield self._close()
        if self.separate and encoded.last:
            yield from self.finish()

    def finish(self) -> Iterator[Block]:
        """The last, partial block."""
        if self._filled >= MIN_TOKENS:
            yield self._close()
        self._parts, self._starts, self._filled = [], [0], 0

    def _close(self) -> Block:
        # A document that ended exactly here leaves a start at the border: it belongs to the next block.
        starts = [start for start in self._starts if start < self._filled]
        block = Block(np.concatenate(self._parts), None, np.asarray(starts, np.int32) if self.boundaries else None)
        self._parts, self._starts, self._filled = [], [0], 0
        return block


class ConversationPacker:
    """Conversations into blocks: one a block, or (packing) best-fit, kept apart by position_ids.

    Best fit: into the open block that it fills best; when OPEN_BLOCKS are open and none has room, the fullest is handed
    on. truncation: of conversations longer than max_length the rest is cut off (truncate), goes on in blocks of its own
    (split), or the whole is dropped (drop). What has no supervised tokens is dropped.
    """

    def __init__(self, max_length: int, *, packing: bool, truncation: str, counts: Counts) -> None:
        self.max_length, self.packing, self.truncation, self.counts = max_length, packing, truncation, counts
        self._open: list[list[Block]] = []
        self._filled: list[int] = []

    def add(self, encoded: Encoded) -> Iterator[Block]:
        for block in self._fitted(encoded):
            if self.packing:
                yield from self._place(block)
            else:
                yield block

    def _place(self, block: Block) -> Iterator[Block]:
        best = None
        for i, filled in enumerate(self._filled):
            if filled + len(block) <= self.max_length and (best is None or filled > self._filled[best]):
                best = i
        if best is None:
            if len(self._open) == OPEN_BLOCKS:
                yield self._close(max(range(OPEN_BLOCKS), key=self._filled.__getitem__))
            self._open.append([])
            self._filled.append(0)
            best = len(self._open) - 1
        self._open[best].append(block)
        self._filled[best] += len(block)
        if self._filled[best] > self.max_length - MIN_TOKENS:
            yield self._close(best)

    def finish(self) -> Iterator[Block]:
        """The blocks still open, oldest first."""
        while self._open:
            yield self._close(0)

    def _fitted(self, encoded: Encoded) -> list[Block]:
        """What of a conversation is trained on, in blocks that are no longer than max_length."""
        ids, supervised, size = encoded.input_ids, encoded.supervised, self.max_length
        cut = len(ids) - size
        starts = range(0, len(ids), size) if self.truncation == "split" else (0,)
        blocks = [
            Block(ids[s : s + size], None if supervised is None else supervised[s : s + size], None) for s in starts
        ]
        fit = [block for block in blocks if len(block) >= MIN_TOKENS and block.supervised_tokens]
        if not fit or (cut > 0 and self.truncation == "drop"):
            self.counts.dropped += 1
            return []
        if cut > 0 and self.truncation == "truncate":
            self.counts.truncated_documents += 1
            self.counts.truncated_tokens += cut
        return fit

    def _close(self, which: int) -> Block:
        blocks = self._open.pop(which)
        self._filled.pop(which)
        starts = np.cumsum([0] + [len(block) for block in blocks[:-1]])
        masks = [block.supervised for block in blocks if block.supervised is not None]
        return Block(
            np.concatenate([block.input_ids for block in blocks]),
            np.concatenate(masks) if masks else None,
            starts.astype(np.int32),
        )
