"""The sequences that importance is measured on: drawn anew for every iteration, by seed."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from graftlm.demo import demo_config
from graftlm.errors import UserError
from graftlm.pruning.base import TOKENS_A_PASS, Batch
from graftlm.pruning.settings import PruneSettings
from graftlm.training.config import RunConfig, SourceConfig
from graftlm.training.data import prepare_data
from graftlm.training.data.sources import HUB_PREFIX, source_bytes

POOL = 2**16
"""Sequences to draw from at most, spread evenly over the data."""
POOL_TOKENS = 2**24
"""Tokens that are held in memory at most, where data are not read whole."""
LARGE = 2**30
"""Bytes of a source above which, as of one on the Hub, it is not read whole."""
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
    task: Literal["auto", "cpt", "sft"] = "auto",
    held_back: RunConfig | None = None,
    progress: bool = True,
) -> TextCalibration:
    """Sequences of `data` to measure importance on: text or conversations, cut into pieces of sample_length tokens, of
    which the shorter ones are left out.

    data: None: the text that `graftlm demo` trains on, and a note says so.
    streaming: no more is read than the first POOL sequences, as many of each source as its weight asks for; so too of
    large data without `held_back`. A note says so.
    task: as a run reads the data.
    held_back: a run on the same data, what it holds out of which is left out.

    Raises UserError for data that cannot be read or are shorter than settings.samples sequences.
    """
    notes: tuple[str, ...] = ()
    # What a run holds back of few documents, only reading all of them tells; it has done so already.
    large = not streaming and held_back is None and is_large(data or ())
    if not data:
        data = demo_config(Path("unused")).data
        notes = (
            "no --data: measured on the demo's text, the source of Python's library; name text that you care about",
        )
    samples, length = settings.samples, settings.sample_length
    assert samples is not None  # of a default or a preset
    # Not packed: a sequence is of one document. Every token counts, so a piece of a conversation needs no answer.
    fraction, most = (held_back.eval_fraction, held_back.eval_max_blocks) if held_back else (0.0, 1)
    pieces = -(-held_back.max_length // length) if held_back else 1  # in a block of the run
    config = RunConfig(
        "calibration",
        tuple(data),
        task=task,
        packing=False,
        eval_fraction=fraction,
        eval_max_blocks=most * pieces,
        max_length=length,
        assistant_only_loss=False,
        truncation="split",
        cache_dir=cache_dir,
        streaming=streaming,
        max_steps=1,  # unused; a stream has no length
    )
    pool = min(POOL, max(len(data), POOL_TOKENS // length))
    if large or streaming:
        # Each source for itself: a mixture ends with its shortest.
        weights = [1.0 if source.weight is None else source.weight for source in config.data]
        sequences: Any = []
        for source, weight in zip(config.data, weights, strict=True):
            alone = dataclasses.replace(config, data=(dataclasses.replace(source, weight=None),), streaming=True)
            sequences += _first(alone, tokenizer, max(1, round(pool * weight / sum(weights))))
        why = "data are streamed" if streaming else f"data on the Hub or above {LARGE >> 30} GiB"
        notes = (*notes, f"{why}: only the first {len(sequences):,} sequences are drawn from")
    else:
        prepared = prepare_data(config, tokenizer, progress=progress)
        sequences = prepared.train
        if fraction:
            sequences.index = _clear_of(prepared.evaluation, sequences, pieces)
    there = len(sequences)
    candidates = np.arange(there) if there <= POOL else np.linspace(0, there - 1, POOL).round().astype(np.int64)
    whole = np.array([n for n in candidates if len(sequences[int(n)]["input_ids"]) == length], np.int64)
    if len(whole) < samples:
        names = ", ".join(source.path for source in data)
        tokens = sum(len(sequences[n]["input_ids"]) for n in range(there))
        raise UserError(
            f"prune: {names}: {len(whole)} sequences of {length} tokens ({tokens:,} tokens in all, shorter documents "
            f"left out), and an iteration needs {samples}; give more text, or smaller samples or sample_length"
        )
    held = min(HELD_OUT, int(len(whole) * HELD_OUT_SHARE), len(whole) - samples)
    numbers = np.arange(len(whole))
    back = numbers[[i * len(whole) // held for i in range(held)]] if held else numbers[:0]
    numbers = np.setdiff1d(numbers, back)
    return TextCalibration(sequences, whole[numbers], whole[back], samples, length, settings.seed, notes)


def _first(config: RunConfig, tokenizer: PreTrainedTokenizerBase, count: int) -> list[dict[str, Any]]:
    """The first `count` sequences of a stream."""
    train: Any = prepare_data(config, tokenizer).train
    return list(itertools.islice(train.one_pass(), count))


def is_large(data: Sequence[SourceConfig]) -> bool:
    """Whether a source is too much to be read whole for some sequences of it."""
    return any(source.path.startswith(HUB_PREFIX) or source_bytes(source) > LARGE for source in data)


def _clear_of(held: Any, train: Any, pieces: int) -> np.ndarray:
    """Rows (source, block) of train's index. Of a document whose end is held back, the last blocks before that are left
    out, too: a run rounds what it holds back to blocks of its own length, of so many pieces."""
    kept = np.ones(len(train.index), bool)
    for number, source in enumerate(train.sources):
        if held is not None and any(source is one for one in held.sources):
            own = train.index[:, 0] == number
            kept &= ~own | (train.index[:, 1] <= train.index[own, 1].max() - pieces)
    return train.index[kept] if kept.any() else train.index
