"""Files by what is in them: a hash that does not change when they are copied or moved."""

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

CHUNK = 2**22


def path_content(path: Path) -> str:
    """Hash of a file, or of all files in a folder with their names; a model card (README.md) may tell of dates."""
    if path.is_file():
        return file_content(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "README.md")
    return digest((str(file.relative_to(path)), file_content(file)) for file in files)


def file_content(path: Path) -> str:
    """Hash of a file's bytes, read once as long as its size and time stay."""
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, as other programs print it, read once as long as its size and time stay."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


def digest(parts: Iterable[object]) -> str:
    """Hash of JSON values."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:20]


@functools.lru_cache(maxsize=4096)
def _sha256(file: Path, size: int, time: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.lru_cache(maxsize=4096)
def _read(file: Path, size: int, time: int) -> str:
    found = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()
