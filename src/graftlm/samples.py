"""Which token of a batch belongs to which sample, told without asking the device where it can be helped.

Shapes: B rows, S positions, T = B * S tokens in the order of rows, n samples.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that is not supervised."""


@dataclass(frozen=True)
class Samples:
    """Samples are runs of consecutive tokens, in order; some tokens (padding) belong to none."""

    count: int
    """n."""
    rows: int
    """B. Where `ids` is None, each row is one whole sample, or the whole batch is (n = 1)."""
    length: int
    """S."""
    ids: Tensor | None = None
    """int64 [T], never falling: the sample of each token; of padding, that of a neighbour."""
    counts: Tensor | None = None
    """bool [T]: not padding. None where `ids` is."""
    valid: Tensor | None = None
    """bool [n]: samples that have a token at all; None: every one."""

    @property
    def tokens(self) -> int | Tensor:
        """Tokens, padding left out: an int where it is known without waiting for a device, else an int64 on it."""
        if self.counts is None:
            return self.rows * self.length
        tokens = self.counts.sum()
        return int(tokens) if tokens.device.type == "cpu" else tokens

    @cached_property
    def runs(self) -> list[tuple[int, int, int | None]]:
        """On a CPU: (first token, last token + 1, sample; None for padding) of every sample, in order."""
        if self.ids is None or self.counts is None:
            whole = self.rows // self.count * self.length
            return [(n * whole, (n + 1) * whole, n) for n in range(self.count)]
        values, repeats = self.ids.where(self.counts, -1).unique_consecutive(return_counts=True)
        ends = repeats.cumsum(0)
        parts = zip((ends - repeats).tolist(), ends.tolist(), values.tolist(), strict=True)
        return [(begin, end, None if sample < 0 else sample) for begin, end, sample in parts]

    def pieces(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The samples' parts of tokens `begin` to `end`, as `runs`, padding left out."""
        for at in range(bisect_right(self.runs, begin, key=itemgetter(1)), len(self.runs)):
            first, last, sample = self.runs[at]
            if first >= end:
                return
            if sample is not None:
                yield max(first, begin), min(last, end), sample

    def members(self, dtype: torch.dtype) -> Tensor:
        """Which token belongs to which sample, as 0 and 1: [n, T]."""
        assert self.ids is not None and self.counts is not None
        zeros = torch.zeros(self.count, len(self.ids), dtype=dtype, device=self.ids.device)
        return zeros.scatter_(0, self.ids[None], self.counts[None].to(dtype))

    def sum(self, values: Tensor) -> Tensor:
        """Sums by sample: [B, S, units] -> [n, units], in the dtype of `values` even under autocast."""
        if self.ids is None:
            return values.sum(1) if self.count == self.rows else values.sum((0, 1))[None]
        with torch.autocast(values.device.type, enabled=False):  # which would round the sums to bfloat16
            return self.members(values.dtype) @ values.flatten(0, 1)


def find_samples(
    shape: tuple[int, int],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    device: torch.device,
    *,
    look: bool | None = None,
) -> Samples:
    """The samples of a batch of `shape` (B, S). `look`: whether masks may be looked at, to find that they hide nothing;
    None: where that costs nothing, on a CPU.

    A sample is a row, or a document in it where position_ids restart. Padding belongs to none: positions that
    attention_mask hides, and documents of a single token (packed blocks are padded with such).
    """
    rows, length = shape
    look = device.type == "cpu" if look is None else look
    if attention_mask is not None and attention_mask.dim() != 2:
        attention_mask = None
    if position_ids is not None and (position_ids.dim() != 2 or length == 1):
        position_ids = None
    if look and attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if attention_mask is None and position_ids is None:
        return Samples(rows, rows, length)
    row = torch.arange(rows, device=device)[:, None].expand(rows, length)  # [B, S]
    visible = attention_mask.bool() if attention_mask is not None else None
    if position_ids is None:
        assert visible is not None
        return Samples(rows, rows, length, row.flatten(), visible.flatten(), visible.any(1))
    starts = torch.zeros(rows, length + 1, dtype=torch.bool, device=device)  # the last column: the end of the row
    starts[:, 0] = starts[:, -1] = True
    restarts = position_ids.expand(rows, -1).diff(dim=1) != 1
    packed = restarts.any()
    if visible is not None:  # a mask that hides something stands for padding, and positions say nothing
        packed = packed & visible.all()
    starts[:, 1:-1] = restarts & packed
    single = starts[:, :-1] & starts[:, 1:] & packed
    first = starts[:, :-1] & ~single
    ids = first.flatten().cumsum(0).sub_(1).clamp_(min=0)
    # How many documents there are is the one thing that the host must be told, and only where documents are packed:
    # transformers, which looks for them in the same place to build its mask, waits there too.
    count = int(first.sum())
    counts = ~single if visible is None else ~single & visible
    if look and count == rows and bool(counts.all()):
        return Samples(rows, rows, length)
    counts = counts.flatten()
    tokens = torch.zeros(max(count, 1), dtype=torch.int64, device=device).index_add_(0, ids, counts.long())
    return Samples(max(count, 1), rows, length, ids, counts, tokens > 0)


def count_tokens(inputs: Mapping[str, Any]) -> int | Tensor:
    """Tokens of a batch, padding not counted. On a GPU a scalar that is still being computed: fetching it stalls."""
    ids = inputs["input_ids"]
    found = find_samples(tuple(ids.shape), inputs.get("attention_mask"), inputs.get("position_ids"), ids.device)
    return found.tokens
