"""The sequences that importance is measured on: drawn anew for every iteration, by seed."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from graftlm.demo import demo_config
from graftlm.errors import UserError
from graftlm.pruning.base import TOKENS_A_PASS, Batch
from graftlm.pruning.settings import PruneSettings
from graftlm.training.config import RunConfig, SourceConfig
from graftlm.training.data import prepare_data

POOL = 2**16
"""Sequences to draw from at most, spread evenly over the data."""
HELD_OUT, HELD_OUT_SHARE = 64, 1 / 8
"""Sequences held back at most, to measure the loss on."""


@dataclass(frozen=True)
class TextCalibration:
    """Sequences of text, each of `length` tokens and from one document; a Calibration (base.py)."""

    sequences: Sequence[dict[str, Any]]
    """Items with input_ids: those to draw from, among others."""
    numbers: np.ndarray
    """Of the sequences to draw from."""
    held_back: np.ndarray
    """Of other sequences, which are never drawn."""
    samples: int
    length: int
    seed: int
    notes: tuple[str, ...]
    """What a user should know of the data."""

    def __call__(self, iteration: int) -> list[Batch]:
        drawn = np.random.default_rng((self.seed, iteration)).choice(self.numbers, self.samples, replace=False)
        return self._batches(drawn)

    def held_out(self) -> list[Batch]:
        """The sequences held back; none where there were too few."""
        return self._batches(self.held_back)

    def _batches(self, numbers: Sequence[int] | np.ndarray) -> list[Batch]:
        if not len(numbers):
            return []
        rows = np.stack([self.sequences[int(number)]["input_ids"] for number in numbers])
        ids = torch.from_numpy(rows.astype(np.int64))  # [sequences, length]
        return [{"input_ids": part, "labels": part} for part in ids.split(max(1, TOKENS_A_PASS // self.length))]


def calibration_from(
    tokenizer: PreTrainedTokenizerBase,
    settings: PruneSettings,
    data: Sequence[SourceConfig] | None = None,
    *,
    cache_dir: str | None = None,
    streaming: bool = False,
    eval_fraction: float = 0.0,
    progress: bool = True,
) -> TextCalibration:
    """Sequences of `data` to measure importance on: text or conversations, cut into pieces of sample_length tokens, of
    which the shorter ones are left out.

    data: None: the text that `graftlm demo` trains on, and a note says so.
    streaming: of each source no more is read than the first POOL sequences.
    eval_fraction: of a run on the same data, whose held-out documents are left out.

    Raises UserError for data that cannot be read or are shorter than settings.samples sequences.
    """
    notes: tuple[str, ...] = ()
    if not data:
        data = demo_config(Path("unused")).data
        notes = (
            "no --data: measured on the demo's text, the source of Python's library; name text that you care about",
        )
    length = settings.sample_length
    # Not packed: a sequence is of one document. Every token counts, so a conversation need not reach an answer.
    config = RunConfig(
        "calibration",
        tuple(data),
        packing=False,
        eval_fraction=eval_fraction,
        max_length=length,
        assistant_only_loss=False,
        truncation="truncate",
        cache_dir=cache_dir,
        streaming=streaming,
        max_steps=1,  # unused; a stream has no length
    )
    train: Any = prepare_data(config, tokenizer, progress=progress).train
    sequences = list(itertools.islice(train.one_pass(), POOL)) if streaming else train
    there = len(sequences)
    candidates = np.arange(there) if there <= POOL else np.linspace(0, there - 1, POOL).round().astype(np.int64)
    whole = np.array([n for n in candidates if len(sequences[int(n)]["input_ids"]) == length], np.int64)
    if len(whole) < settings.samples:
        names = ", ".join(source.path for source in data)
        tokens = sum(len(sequences[n]["input_ids"]) for n in range(there))
        raise UserError(
            f"prune: {names}: {len(whole)} sequences of {length} tokens ({tokens:,} tokens in all, shorter documents "
            f"left out), and an iteration needs {settings.samples}; give more text, or smaller samples or sample_length"
        )
    held = min(HELD_OUT, int(len(whole) * HELD_OUT_SHARE), len(whole) - settings.samples)
    numbers = np.arange(len(whole))
    back = numbers[[i * len(whole) // held for i in range(held)]] if held else numbers[:0]
    numbers = np.setdiff1d(numbers, back)
    return TextCalibration(sequences, whole[numbers], whole[back], settings.samples, length, settings.seed, notes)
