"""Reading one file: a row at a time, in memory that does not depend on the file's size.

Everything wrong with a file is a UserError that names the file and the line.
"""

import contextlib
import gzip
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from graftlm.errors import UserError
from graftlm.training.data.compressed import COMPRESSED_SUFFIXES, KINDS, TORN, open_text
from graftlm.training.data.json_rows import json_rows

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")

PIECE_CHARACTERS = 2**17
"""A text longer than this is handed on in pieces cut at paragraph borders: bounds memory, feeds every tokeniser
thread."""
PARQUET_ROWS = 32
"""Rows decoded at a time; a row may be a whole book."""
PARQUET_BUFFER = 2**20
"""Bytes of a column that are read at a time; without it Arrow holds the row group, which may be the whole file."""


@dataclass(frozen=True)
class Row:
    """One row of a source, or one piece of a long text (then `fields` has only the text column)."""

    fields: dict[str, Any]
    where: str
    """file:line, for error messages."""
    first: bool = True
    """False for the later pieces of a document."""
    last: bool = True
    """False for every piece of a document but its last."""
    padded: bool = False
    """Nones within it stand for missing keys, for all rows of its table have the same ones."""


class Columns(NamedTuple):
    """What is looked at of a row, so that a table's other columns need not be decoded."""

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


def suffix(path: Path) -> str:
    """The extension that says what a file holds, lower case, without .gz and .zst."""
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    return path.suffix.lower()


def pieces(read: Callable[[int], str], size: int) -> Iterator[tuple[str, bool]]:
    """Cut a text into (piece, is the last one) of about `size` characters at most, at paragraph borders where it can.

    The last piece may be empty. Joined, the pieces are the text.
    """
    buffer = ""
    while chunk := read(size):
        buffer += chunk
        while len(buffer) > size:
            cut = _border(buffer, size)
            yield buffer[:cut], False
            buffer = buffer[cut:]
    yield buffer, True


def _border(text: str, size: int) -> int:
    """Where to cut: after a blank line, else after a line, else before a space, in the second half of `size`."""
    for mark, skip in (("\n\n", 2), ("\n", 1), (" ", 0)):
        at = text.rfind(mark, max(1, size // 2), size)
        if at >= 0:
            return at + skip
    return size


def split_row(row: Row, text_field: str) -> Iterator[Row]:
    """A row with a very long text as several rows; every other row as it is."""
    text = row.fields.get(text_field)
    if not isinstance(text, str) or len(text) <= PIECE_CHARACTERS:
        yield row
        return
    first = True
    for piece, last in pieces(io.StringIO(text, newline="").read, PIECE_CHARACTERS):
        yield Row({text_field: piece}, row.where, first, last)
        first = False


def check_characters(value: Any, where: str) -> None:
    """Raise UserError where a text (in `value`: one, or lists and mappings of them) holds a lone surrogate: JSON may
    spell it (\\ud83d), but it is half of a character, which no tokenizer takes."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {text[error.start]!a} is half of a character (a lone surrogate); mend or remove the row"
        ) from error


def read_file(path: Path, text_field: str, *, table: bool, columns: Columns | None = None) -> Iterator[Row]:
    """The rows of a .jsonl, .json or .parquet file (`table`), or any other file as one text document. columns: the only
    ones that are wanted; others may come all the same."""
    if not table:
        rows = _read_text(path, text_field)
    elif suffix(path) == ".parquet":
        rows = _read_parquet(path, columns)
    else:
        rows = _read_json(path)
    with _plain_errors(path), _plain_os_errors(path):
        yield from rows


def kind_of(path: Path) -> Literal["text", "binary", "other encoding"]:
    """What a whole file of a folder is: UTF-8 without NUL bytes, or none (an image, an archive), or text in another
    encoding, which a person would miss."""
    try:
        with _plain_os_errors(path), open_text(path) as file:
            while chunk := file.read(PIECE_CHARACTERS):
                if "\0" in chunk:
                    return "binary"
    except UnicodeDecodeError as error:
        utf16 = error.object.startswith((b"\xff\xfe", b"\xfe\xff"))
        return "binary" if b"\0" in error.object and not utf16 else "other encoding"
    except TORN:
        return "binary"
    return "text"


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason}, byte {error.object[error.start]:#04x}); convert it to UTF-8"
        ) from error
    except TORN as error:
        kind = KINDS.get(path.suffix.lower(), "compressed")
        raise UserError(f"{path}: torn or not {kind} ({error}); fetch or compress it again") from error
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path}: torn or not parquet ({str(error).splitlines()[0]}); fetch or write it again"
        ) from error


@contextlib.contextmanager
def _plain_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except gzip.BadGzipFile:
        raise  # an OSError too, and no word on the disk
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path and its rights") from error


def _read_text(path: Path, text_field: str) -> Iterator[Row]:
    with open_text(path) as file:
        first = True
        for piece, last in pieces(file.read, PIECE_CHARACTERS):
            if "\0" in piece:
                raise UserError(f"{path}: a binary file (it holds NUL bytes); name a text file, .jsonl or .parquet")
            yield Row({text_field: piece}, str(path), first, last)
            first = False


def _read_json(path: Path) -> Iterator[Row]:
    with open_text(path) as file:
        for fields, line in json_rows(file, path):
            yield Row(fields, f"{path}:{line}")


def _read_parquet(path: Path, columns: Columns | None) -> Iterator[Row]:
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        raise UserError(f"{path}: parquet is compressed within and not read from {path.suffix}; unpack it")
    with pq.ParquetFile(path, buffer_size=PARQUET_BUFFER, pre_buffer=False) as file:
        names = file.schema_arrow.names
        wanted = None
        if columns is not None and all(name in names for name in columns.needed):  # else: all, to say what there is
            wanted = [name for name in names if name in columns.needed or name in columns.optional]
        number = 0
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
            for fields in batch.to_pylist():
                number += 1
                yield Row(fields, f"{path}: row {number}", padded=True)
