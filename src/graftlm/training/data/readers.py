"""Reading one file: a row at a time, in memory that does not depend on the file's size.

Everything wrong with a file is a UserError that names the file and the line.
"""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from graftlm.errors import UserError

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".zst")

PIECE_CHARACTERS = 2**17
"""A text longer than this is handed on in pieces cut at paragraph borders: bounds memory, feeds every tokeniser
thread."""
PARQUET_ROWS = 32
"""Rows decoded at a time; a row may be a whole book."""


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


def read_file(path: Path, text_field: str, *, table: bool) -> Iterator[Row]:
    """The rows of a .jsonl, .json or .parquet file (`table`), or any other file as one text document."""
    if not table:
        rows = _read_text(path, text_field)
    elif suffix(path) == ".parquet":
        rows = _read_parquet(path)
    else:
        rows = _read_json(path)
    with _plain_errors(path), _plain_os_errors(path):
        yield from rows


def is_text(path: Path) -> bool:
    """Whether the whole file is UTF-8 without NUL bytes (folders hold images and archives too)."""
    try:
        with _plain_os_errors(path), _open(path) as file:
            while chunk := file.read(PIECE_CHARACTERS):
                if "\0" in chunk:
                    return False
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error):
        return False
    return True


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason}, byte {error.object[error.start]:#04x}); convert it to UTF-8"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: torn or not gzip ({error}); fetch or compress it again") from error
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


def _open(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if path.suffix.lower() == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"{path}: reading .zst needs a library; pip install zstandard") from error
        return zstandard.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def _read_text(path: Path, text_field: str) -> Iterator[Row]:
    with _open(path) as file:
        first = True
        for piece, last in pieces(file.read, PIECE_CHARACTERS):
            if "\0" in piece:
                raise UserError(f"{path}: a binary file (it holds NUL bytes); name a text file, .jsonl or .parquet")
            yield Row({text_field: piece}, str(path), first, last)
            first = False


def _read_json(path: Path) -> Iterator[Row]:
    """JSON lines, or one array of objects (told apart by the first character)."""
    with _open(path) as file:
        start = file.read(1)
        while start.isspace() and start != "\n":
            start = file.read(1)
        if start == "[":
            yield from _json_array(file, path)
            return
        line = start if start == "\n" else start + file.readline()
        number = 0
        while line:
            number += 1
            yield Row(_json_object(line, f"{path}:{number}"), f"{path}:{number}")
            line = file.readline()


def _json_object(line: str, where: str) -> dict[str, Any]:
    if not line.strip():
        raise UserError(f"{where}: empty line; remove it")
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno}); mend or remove it") from error
    return _checked_object(value, where)


def _checked_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: a JSON object is needed, not a {type(value).__name__}; write {{...}} with the columns"
        )
    return value


def _json_array(file: IO[str], path: Path) -> Iterator[Row]:
    """Objects of `[{...}, {...}]`, decoded one by one from a buffer, so that a large array is never held whole."""
    decoder, buffer, line = json.JSONDecoder(), "", 1
    closed, separated = False, True
    while True:
        body = buffer.lstrip()
        line += buffer.count("\n", 0, len(buffer) - len(body))
        buffer = body
        where = f"{path}:{line}"
        if closed and buffer:
            raise UserError(f"{where}: text after the closing ]; remove it, or write one object a line (.jsonl)")
        if buffer[:1] == "]":
            closed, buffer = True, buffer[1:]
            continue
        if buffer[:1] == "," and not separated:
            separated, buffer = True, buffer[1:]
            continue
        try:
            if not buffer or not separated:
                raise json.JSONDecodeError("a comma or ] is missing", buffer, 0)
            value, end = decoder.raw_decode(buffer)
        except json.JSONDecodeError as error:
            # The object may go on beyond the buffer; reading as much again keeps the work linear.
            more = file.read(max(PIECE_CHARACTERS, len(buffer))) if separated or not buffer else ""
            if more:
                buffer += more
                continue
            if closed:
                return
            at = line + buffer.count("\n", 0, error.pos)
            raise UserError(f"{path}:{at}: not valid JSON ({error.msg}); mend the array") from error
        yield Row(_checked_object(value, where), where)
        separated = False
        line += buffer.count("\n", 0, end)
        buffer = buffer[end:]


def _read_parquet(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=PARQUET_ROWS):
            for fields in batch.to_pylist():
                number += 1
                yield Row(fields, f"{path}: row {number}")
