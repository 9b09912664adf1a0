"""Blocks on disk: an Arrow file that is memory-mapped, in a folder that appears whole or not at all."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from graftlm.errors import UserError
from graftlm.files import atomic_folder, make_once, read_json, write_json
from graftlm.training.data.formats import TEMPLATE_DATE
from graftlm.training.data.packing import Block
from graftlm.training.data.statistics import Counts

LAYOUT = 2
"""Raised when the same settings give other blocks than before: old caches are then not found."""
BATCH_TOKENS = 2**20
"""Tokens of one Arrow record batch, about: what the writer holds in memory."""
ABANDONED_SECONDS = 3600
"""A half-written folder that nobody has touched for so long was left by a killed process."""
TRAIN, HELD_OUT, COUNTS = "train.arrow", "held_out.arrow", "counts.json"

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.bool_())),  # null: every token
        ("starts", pa.list_(pa.int32())),  # null: one sequence
        ("supervised_tokens", pa.int32()),
    ]
)


class BlockWriter:
    """Writes blocks to an Arrow file in batches of a fixed number of rows, so that a row is found by division."""

    def __init__(self, path: Path, max_length: int) -> None:
        self.rows = max(1, BATCH_TOKENS // max_length)
        self._sink = pa.OSFile(str(path), "wb")
        self._schema = SCHEMA.with_metadata({"rows": str(self.rows)})
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        self._blocks: list[Block] = []

    def add(self, block: Block) -> None:
        self._blocks.append(block)
        if len(self._blocks) == self.rows:
            self._flush()

    def close(self) -> None:
        if self._blocks:
            self._flush()
        self._writer.close()
        self._sink.close()

    def _flush(self) -> None:
        blocks, self._blocks = self._blocks, []
        columns = [
            _list_array([block.input_ids for block in blocks], pa.int32()),
            _list_array([block.supervised for block in blocks], pa.bool_()),
            _list_array([block.starts for block in blocks], pa.int32()),
            pa.array([block.supervised_tokens for block in blocks], pa.int32()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))


def _list_array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Lists as one Arrow column; a column of None only is null everywhere."""
    if values[0] is None:
        return pa.nulls(len(values), pa.list_(kind))
    offsets = np.cumsum([0] + [len(value) for value in values])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.concatenate(values), kind))


class BlockFile:
    """Blocks of a file written by BlockWriter, read from a memory map: what is resident is the page cache's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._rows = int(self._reader.schema.metadata[b"rows"])
        batches = self._reader.num_record_batches
        last = self._reader.get_batch(batches - 1).num_rows if batches else 0
        self._length = max(batches - 1, 0) * self._rows + last

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # a map does not travel to a worker process: it opens its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Block:
        batch = self._reader.get_batch(index // self._rows)
        row = index % self._rows
        ids, supervised, starts = (_row(batch.column(column), row) for column in range(3))
        assert ids is not None  # the writer never leaves it out
        return Block(ids, supervised, starts)

    def sizes(self) -> np.ndarray:
        """int32 [blocks, 2]: tokens and supervised tokens of every block."""
        parts = [np.zeros((0, 2), np.int32)]
        for i in range(self._reader.num_record_batches):
            batch = self._reader.get_batch(i)
            parts.append(np.stack([np.diff(batch.column(0).offsets.to_numpy()), batch.column(3).to_numpy()], axis=1))
        return np.concatenate(parts).astype(np.int32)


def _row(column: pa.ListArray, row: int) -> np.ndarray | None:
    if not column[row].is_valid:
        return None
    begin, end = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    return column.values.slice(begin, end - begin).to_numpy(zero_copy_only=False)


def cached_blocks(
    folder: Path, blocks: Iterator[tuple[bool, Block]], counts: Counts, max_length: int
) -> tuple[BlockFile, BlockFile, Counts]:
    """Training blocks, held-out blocks and counts in `folder`; if it is missing, written from (held out?, block) pairs.

    Killed in the middle, nothing is left under the folder's name. Another process that wants the same data waits until
    they are written.
    """
    make_once(folder, lambda: _write(folder, blocks, counts, max_length))
    try:
        return BlockFile(folder / TRAIN), BlockFile(folder / HELD_OUT), Counts(**read_json(folder / COUNTS))
    except (OSError, pa.ArrowInvalid, UserError) as error:
        raise UserError(f"{folder}: the cache is damaged ({error}); delete that folder and start again") from error


def _write(folder: Path, blocks: Iterator[tuple[bool, Block]], counts: Counts, max_length: int) -> None:
    _remove_abandoned(folder)
    with atomic_folder(folder) as temporary:
        train, held_out = (BlockWriter(temporary / name, max_length) for name in (TRAIN, HELD_OUT))
        for held, block in blocks:
            (held_out if held else train).add(block)
        train.close()
        held_out.close()
        write_json(temporary / COUNTS, asdict(counts))


def _remove_abandoned(folder: Path) -> None:
    for other in folder.parent.glob(f".{folder.name}.*"):
        touched = max((path.stat().st_mtime for path in [other, *other.rglob("*")]), default=0.0)
        if time.time() - touched > ABANDONED_SECONDS:
            shutil.rmtree(other, ignore_errors=True)


def cache_key(**parts: Any) -> str:
    """sha256 over JSON of everything that the blocks depend on."""
    text = json.dumps({"layout": LAYOUT, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides a tokenizer's output: vocabulary, merges, rules, special tokens and the chat template."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules |= {"padding": None, "truncation": None}  # left behind by earlier calls; never used here
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    dated = {"date": TEMPLATE_DATE.isoformat()} if "strftime_now" in str(tokenizer.chat_template) else {}
    return cache_key(rules=rules, special=special, chat_template=tokenizer.chat_template, **dated)
