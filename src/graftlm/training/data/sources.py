"""From a SourceConfig to its rows: a file, a folder, or a Hub dataset, always in the same order."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftlm.content import digest, file_content
from graftlm.errors import UserError
from graftlm.training.config import SourceConfig
from graftlm.training.data.readers import ROW_SUFFIXES, Columns, Row, kind_of, read_file, suffix
from graftlm.training.data.statistics import Counts

HUB_PREFIX = "hub:"

SETTINGS = ".json"
"""Holds rows only where all files of a folder do: among source files it is a settings file."""
OTHER_TABLES = (".csv", ".tsv", ".arrow", ".feather", ".xlsx")
SAVED_TO_DISK = ("dataset_info.json", "dataset_dict.json")
"""By which a folder of datasets.save_to_disk is known."""
ABOUT = ("readme", "license", "licence")
"""How files begin that lie beside tables to say what they are."""


def iterate_rows(source: SourceConfig, counts: Counts | None = None, columns: Columns | None = None) -> Iterator[Row]:
    """Stream the rows of `source`, at most `limit` documents of it; what is left out of a folder is counted. columns:
    those that are wanted, if they are known.

    A text file longer than readers.PIECE_CHARACTERS arrives as several rows (Row.first, Row.last).
    """
    counts = counts if counts is not None else Counts()
    rows = _hub_rows(source) if source.path.startswith(HUB_PREFIX) else _file_rows(source, counts, columns)
    documents = 0
    for row in rows:
        documents += row.first
        if source.limit is not None and documents > source.limit:
            return
        if source.half is None or documents % 2 == (source.half == "even"):  # documents is its number from 1
            yield row


def list_files(source: SourceConfig) -> list[Path]:
    """The files of a local source that are read (but for binary ones), sorted."""
    return _files(source)[0]


def _files(source: SourceConfig) -> tuple[list[Path], int, int]:
    """Those, and how many were left out: that only tell about a folder's tables, and tables in forms that are not read
    among a folder's texts. Hidden ones are no matter."""
    found = _found(source)
    if Path(source.path).expanduser().is_file():
        return found, 0, 0
    rest = [file for file in found if suffix(file) in ROW_SUFFIXES or not file.name.lower().startswith(ABOUT)]
    kinds = {suffix(file) for file in rest}
    if kinds & set(ROW_SUFFIXES) - {SETTINGS}:
        rest = [file for file in rest if suffix(file) != ".md"]
    elif kinds - {SETTINGS, *OTHER_TABLES}:  # texts, such as sources, among which a table is a detail
        texts = [file for file in found if suffix(file) not in OTHER_TABLES]
        return texts, 0, len(found) - len(texts)
    elif kinds != {SETTINGS}:  # _check_readable refuses those
        return found, 0, 0
    return rest, len(found) - len(rest), 0


def _found(source: SourceConfig) -> list[Path]:
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
    tables = _tables([file for file, _ in stats])
    return identity | {
        # A link's name, not that of what it points to, says how a file is read.
        "files": [
            [str(file.resolve()), stat.st_size, stat.st_mtime_ns] + ([] if file in tables else ["text"])
            for file, stat in stats
        ]
    }


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
    other = [file for file in files if suffix(file) in OTHER_TABLES]
    if other:
        kind = suffix(other[0])
        how = f'datasets.Dataset.from_csv("{other[0].name}").to_parquet("data.parquet")'
        raise UserError(
            f"data: {other[0]}: {kind} is not read; write it as .jsonl or .parquet"
            + (f", e.g. with {how}" if kind in (".csv", ".tsv") else "")
            + (", or leave it out with pattern" if len(other) < len(files) else "")
        )


def _tables(files: list[Path]) -> set[Path]:
    """Which of the files of a source are read as rows, the others as texts."""
    if all(suffix(file) in ROW_SUFFIXES for file in files):
        return set(files)
    return {file for file in files if suffix(file) in ROW_SUFFIXES and suffix(file) != SETTINGS}


def _file_rows(source: SourceConfig, counts: Counts, columns: Columns | None) -> Iterator[Row]:
    files, counts.files_about_tables, counts.tables_left_out = _files(source)
    _check_readable(source, files)
    single = Path(source.path).expanduser().is_file()
    tables = _tables(files)
    for file in files:
        kind = "text" if single or file in tables else kind_of(file)
        if kind == "text":
            yield from read_file(file, source.text_field, table=file in tables, columns=columns)
        elif kind == "binary":
            counts.skipped_files += 1
        else:
            counts.not_utf8.append(str(file))


def _hub_rows(source: SourceConfig) -> Iterator[Row]:
    import datasets

    repository = source.path.removeprefix(HUB_PREFIX)
    if not repository.strip("/ "):
        raise UserError(f"data: {source.path}: no dataset is named; write {HUB_PREFIX}OWNER/NAME")
    try:
        dataset = datasets.load_dataset(repository, source.name, split=source.split, streaming=True)
        for number, fields in enumerate(dataset, start=1):
            yield Row(fields, f"{source.path} ({source.split}): row {number}", padded=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data: {source.path}: cannot be read from the Hub ({reason}); check path, name, split and the connection"
        ) from error
