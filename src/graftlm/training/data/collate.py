"""Blocks -> a batch of tensors in which padding is never seen and never counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graftlm.samples import IGNORED


@dataclass(frozen=True)
class Collator:
    """Pads on the right and stacks; call it on a list of items. Returns int64 tensors of shape [batch, length].

    Rows with position_ids (documents kept apart): never an attention_mask, because transformers looks for boundaries in
    position_ids only without one. Padding tokens become documents of one token each (position 0, labels -100), which
    nothing else attends to and assessment does not count.
    Rows without: an attention_mask only if something is padded.
    """

    pad_token_id: int
    flatten: bool = False
    """Rows with position_ids are joined into one row [1, total] without padding. Flash attention needs that: it looks
    for boundaries only in batches of one row, and would let documents see each other otherwise."""

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        apart = "position_ids" in items[0]
        if apart and self.flatten:
            joined = {key: np.concatenate([np.asarray(item[key]) for item in items]) for key in items[0]}
            return {key: torch.from_numpy(value.astype(np.int64))[None] for key, value in joined.items()}
        lengths = [len(item["input_ids"]) for item in items]
        longest = max(lengths)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0}
        batch = {}
        for key in items[0]:
            out = np.empty((len(items), longest), np.int64)
            for row, (item, length) in enumerate(zip(items, lengths, strict=True)):
                out[row, :length] = item[key]
                out[row, length:] = fill[key]
            batch[key] = torch.from_numpy(out)
        if not apart and min(lengths) < longest:
            batch["attention_mask"] = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
        return batch
