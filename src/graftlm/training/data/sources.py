"""From a SourceConfig to its rows: a file, a folder, or a Hub dataset, always in the same order."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftlm.content import digest, file_content
from graftlm.errors import UserError
from graftlm.training.config import SourceConfig
from graftlm.training.data.readers import ROW_SUFFIXES, Row, is_text, read_file, suffix
from graftlm.training.data.statistics import Counts

HUB_PREFIX = "hub:"

OTHER_TABLES = (".csv", ".tsv", ".arrow", ".feather", ".xlsx")
SAVED_TO_DISK = ("dataset_info.json", "dataset_dict.json")
"""By which a folder of datasets.save_to_disk is known."""


def iterate_rows(source: SourceConfig, counts: Counts | None = None) -> Iterator[Row]:
    """Stream the rows of `source`, at most `limit` documents of it; binary files of a folder are counted and skipped.

    A text file longer than readers.PIECE_CHARACTERS arrives as several rows (Row.first, Row.last).
    """
    counts = counts if counts is not None else Counts()
    rows = _hub_rows(source) if source.path.startswith(HUB_PREFIX) else _file_rows(source, counts)
    documents = 0
    for row in rows:
        documents += row.first
        if source.limit is not None and documents > source.limit:
            return
        if source.half is None or documents % 2 == (source.half == "even"):  # documents is its number from 1
            yield row


def list_files(source: SourceConfig) -> list[Path]:
    """The files of a local source, sorted; hidden ones are left out of folders."""
    path = Path(source.path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"data: {source.path}: no such file or folder; for a Hub dataset write {HUB_PREFIX}OWNER/NAME")
    try:
        found = sorted(path.glob(source.pattern))
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"data.pattern: {source.pattern!r} of {source.path}: {error}; give a glob such as **/*"
        ) from error
    files = [f for f in found if f.is_file() and not any(p.startswith(".") for p in f.relative_to(path).parts)]
    if not files:
        raise UserError(f"data: {source.path}: no file matches the pattern {source.pattern!r}; set pattern")
    return files


def source_choice(source: SourceConfig) -> dict[str, Any]:
    """What of a source is read, as JSON."""
    choice: dict[str, Any] = {"limit": source.limit, "text_field": source.text_field, "format": source.format}
    return choice | ({"half": source.half} if source.half is not None else {})


def source_identity(source: SourceConfig) -> dict[str, Any]:
    """What a source's content depends on, as JSON: path, size and time of each file; on the Hub name, subset and split.

    A Hub dataset that changes under its name is not noticed.
    """
    identity = source_choice(source)
    if source.path.startswith(HUB_PREFIX):
        return identity | {"hub": source.path, "name": source.name, "split": source.split}
    stats = [(file, file.stat()) for file in list_files(source)]
    return identity | {"files": [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]}


def source_content(source: SourceConfig) -> str | None:
    """Hash of the files of a source; None on the Hub, which goes by its name."""
    if source.path.startswith(HUB_PREFIX):
        return None
    folder = Path(source.path).expanduser()
    files = [(str(file.relative_to(folder)) if folder.is_dir() else "", file) for file in list_files(source)]
    return digest((name, file_content(file)) for name, file in files)


def source_bytes(source: SourceConfig) -> int:
    """Size of the files of a source; 0 on the Hub."""
    return 0 if source.path.startswith(HUB_PREFIX) else sum(file.stat().st_size for file in list_files(source))


def _check_readable(source: SourceConfig, files: list[Path]) -> None:
    """Raise UserError for tables in forms that are not read: as texts they would be trained on as they stand."""
    path = Path(source.path).expanduser()
    if any((path / name).is_file() for name in SAVED_TO_DISK):
        raise UserError(
            f"data: {source.path}: written by datasets.save_to_disk, which is not read; write it once more with "
            f'datasets.load_from_disk("{source.path}").to_parquet("data.parquet")'
        )
    if files and all(suffix(file) in OTHER_TABLES for file in files):
        kind = suffix(files[0])
        how = f'datasets.Dataset.from_csv("{files[0].name}").to_parquet("data.parquet")'
        raise UserError(
            f"data: {source.path}: {kind} is not read; write it as .jsonl or .parquet"
            + (f", e.g. with {how}" if kind in (".csv", ".tsv") else "")
        )


def _file_rows(source: SourceConfig, counts: Counts) -> Iterator[Row]:
    files = list_files(source)
    _check_readable(source, files)
    single = Path(source.path).expanduser().is_file()
    # A .json among source files is a settings file, not a table: it holds rows only where all files do.
    tables = all(suffix(file) in ROW_SUFFIXES for file in files)
    table_suffixes = ROW_SUFFIXES if tables else tuple(name for name in ROW_SUFFIXES if name != ".json")
    for file in files:
        table = suffix(file) in table_suffixes
        if single or table or is_text(file):
            yield from read_file(file, source.text_field, table=table)
        else:
            counts.skipped_files += 1


def _hub_rows(source: SourceConfig) -> Iterator[Row]:
    import datasets

    repository = source.path.removeprefix(HUB_PREFIX)
    try:
        dataset = datasets.load_dataset(repository, source.name, split=source.split, streaming=True)
        for number, fields in enumerate(dataset, start=1):
            yield Row(fields, f"{source.path} ({source.split}): row {number}")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data: {source.path}: cannot be read from the Hub ({reason}); check path, name, split and the connection"
        ) from error
