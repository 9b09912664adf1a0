"""What was counted while data was prepared."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Counts:
    """Counted while one source is read; kept beside its cache."""

    documents: int = 0
    """Documents read for training, dropped ones included."""
    held_out_documents: int = 0
    """Documents kept for evaluation."""
    empty: int = 0
    """Documents without text, left out."""
    skipped_files: int = 0
    """Binary files of a folder, left out."""
    not_utf8: list[str] = field(default_factory=list)
    """Text files of a folder in another encoding, left out."""
    files_about_tables: int = 0
    """README, LICENSE and .md files beside a folder's tables, left out."""
    tables_left_out: int = 0
    """Tables in forms that are not read among a folder's texts."""
    truncated_documents: int = 0
    """Conversations cut at max_length."""
    truncated_tokens: int = 0
    """Tokens cut off by that."""
    dropped: int = 0
    """Conversations left out: longer than max_length (truncation: drop), or no supervised token left after the cut."""


@dataclass(frozen=True)
class SourceStatistics:
    """One source's part of an epoch."""

    path: str
    weight: float | None
    """Wanted share of the tokens, as given (not normalised); None: all of every source."""
    documents: int
    tokens: int
    """Tokens of this source in an epoch."""
    blocks: int
    """Blocks of this source in an epoch."""
    share: float
    """Realised share of the epoch's tokens, 0..1."""
    passes: float
    """How often an epoch goes through the source: 1 is all of it, 0.1 a tenth of its blocks."""


@dataclass(frozen=True)
class DataStatistics:
    """What one epoch trains on. None: not known, because the data is streamed."""

    documents: int | None
    """Documents read for training (held-out, empty and dropped ones not counted)."""
    tokens: int | None
    blocks: int | None
    supervised_tokens: int | None
    """Tokens that count in the loss."""
    supervised_share: float
    """Of the tokens, 0..1. Streaming: of the first blocks."""
    truncated_documents: int
    truncated_share: float
    """Of the documents, 0..1. Streaming: of the first blocks."""
    dropped: int
    held_out_documents: int
    evaluation_blocks: int
    """Blocks evaluated each time."""
    longest: int | None = None
    """Tokens of the longest block."""
    padded_length: float | None = None
    """Tokens of a row, on average, as micro-batches are padded to their longest one."""
    sources: list[SourceStatistics] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a person should know: how evaluation data was held back, what was left out, unused parts of sources."""


def truncation(counts: Sequence[Counts]) -> dict[str, Any]:
    """The fields of DataStatistics on what was cut and dropped, over several sources."""
    documents = sum(count.documents for count in counts)
    truncated = sum(count.truncated_documents for count in counts)
    dropped = sum(count.dropped for count in counts)
    return {
        "truncated_documents": truncated,
        "truncated_share": truncated / documents if documents else 0.0,
        "dropped": dropped,
    }


def left_out(paths: Sequence[str], counts: Sequence[Counts]) -> list[str]:
    """A note for everything that was read and not used."""
    notes = []
    for path, count in zip(paths, counts, strict=True):
        said = {
            "documents without text left out": count.empty,
            "conversations dropped (too long, or no supervised token left)": count.dropped,
        }
        notes += [f"{path}: {number} {what}" for what, number in said.items() if number]
        notes += [f"{path}: {what}" for what in [not_read(count)] if what]
    return notes


def not_read(count: Counts) -> str:
    """Words on the files of a folder that are not read; empty where all are."""
    parts = [
        f"{count.skipped_files} binary files skipped" if count.skipped_files else "",
        f"{len(count.not_utf8)} files skipped that are not UTF-8 (convert them), the first {count.not_utf8[0]}"
        if count.not_utf8
        else "",
        f"{count.files_about_tables} README, LICENSE or .md files beside tables left out"
        if count.files_about_tables
        else "",
        f"{count.tables_left_out} tables left out (.csv and the like; written as .jsonl or .parquet they are read)"
        if count.tables_left_out
        else "",
    ]
    return ", ".join(part for part in parts if part)
