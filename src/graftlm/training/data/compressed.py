"""Text files as they are or packed by gzip or zstd, read as a stream; one that was cut off is noticed."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from graftlm.errors import UserError

COMPRESSED_SUFFIXES = (".gz", ".zst")
KINDS = {".gz": "gzip", ".zst": "zstd"}
TORN = (EOFError, gzip.BadGzipFile, zlib.error)
"""What reading a file raises that was cut off or is not packed as its name says."""
PACKED_BYTES = 2**13
"""Read at a time of a .zst: what they unpack to is held, at worst some thousand times as much."""
ENCODING = "utf-8-sig"


def open_text(path: Path) -> IO[str]:
    """The unpacked text. Raises one of TORN, or UnicodeDecodeError, while it is read."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding=ENCODING)
    if path.suffix.lower() != ".zst":
        return open(path, encoding=ENCODING)
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: reading .zst needs a library; pip install zstandard") from error
    return io.TextIOWrapper(io.BufferedReader(_Chunks(_unpacked(path, zstandard))), encoding=ENCODING)


def _unpacked(path: Path, zstandard: Any) -> Iterator[bytes]:
    """Every frame of the file, one after the other. zstandard's own readers take the end of a file in the middle of a
    frame for its end."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # what `zstd --long=31` writes
    frame = None
    with open(path, "rb") as file:
        while data := file.read(PACKED_BYTES):
            while data:
                frame = frame or decompressor.decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")


class _Chunks(io.RawIOBase):
    """Bytes that come in chunks, as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
