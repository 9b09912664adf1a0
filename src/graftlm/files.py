"""Writing that survives a kill: to a temporary name, fsync, rename."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from graftlm.errors import UserError

UNFINISHED = ".unfinished-"
"""Part of the name of everything that is being written."""
OLD = ".old"
"""The end of the name of a folder that is being replaced."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system says that has no locks (some that several machines share)."""


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def plain_disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's word on a full or read-only disk into a line that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system says in an error of its own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"cannot write {path}: {reason}; free space or choose another folder") from error


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file name beside `path`; on success it is fsynced and renamed to `path`, else removed."""
    path = Path(path)
    with plain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{UNFINISHED}")
        temporary = Path(name)
        try:
            _lock(handle)
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp makes 0600, which would hide a run from its owner's group
            _fsync(temporary)
            temporary.replace(path)
            _fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(handle)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success its files are fsynced and it takes `path`'s place (that of the
    folder which a symbolic link names).

    A folder that stands at `path` is moved aside first and removed only after the new one is in place. A process killed
    between the two leaves it aside: the next one puts it back (put_back).
    """
    path = without_link(path)
    with plain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        put_back(path)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{UNFINISHED}"))
        old = temporary.with_name(temporary.name + OLD)
        handle = os.open(temporary, os.O_RDONLY)
        try:
            _lock(handle)
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o777 & ~umask)
            for file in temporary.rglob("*"):
                # Some writers (safetensors) make files that only their owner can read.
                file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)
                _fsync(file)
            _fsync(temporary)
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            _fsync(path.parent)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
            os.close(handle)


def without_link(path: str | os.PathLike[str]) -> Path:
    """The folder or file that a symbolic link names: to be replaced in its place, not the link; others as they are."""
    return Path(path).resolve() if Path(path).is_symlink() else Path(path)


def _lock(handle: int) -> None:
    """Mark something as being written: the system takes the mark back from a killed process."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _being_written(path: Path) -> bool:
    """Whether a living process is at it (False on a file system without locks)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # gone meanwhile
        return False
    try:
        _lock(handle)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def put_back(path: str | os.PathLike[str]) -> None:
    """Give the folder `path` its name again where a process was killed after it had moved it aside (atomic_folder)."""
    path = Path(path)
    for old in path.parent.glob(f".{glob.escape(path.name)}{UNFINISHED}*{OLD}"):
        if not path.exists() and not _being_written(old.with_name(old.name.removesuffix(OLD))):
            old.rename(path)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Remove a folder with all that is in it: under its name it is whole, or gone, also for who is killed meanwhile."""
    path = Path(path)
    gone = path.with_name(f".{path.name}{UNFINISHED}gone")
    if gone.exists():
        shutil.rmtree(gone)
    path.rename(gone)
    shutil.rmtree(gone)


def remove_unfinished(folder: str | os.PathLike[str], name: str = "*") -> None:
    """Remove what atomic_path and atomic_folder were writing in `folder` (as `name`, a pattern) when a process was
    killed, and put back what was to be replaced. What another process is writing stays."""
    for left in Path(folder).glob(f".{name}{UNFINISHED}*"):
        if left.name.endswith(OLD):
            put_back(left.with_name(left.name[1:].partition(UNFINISHED)[0]))
    for left in Path(folder).glob(f".{name}{UNFINISHED}*"):
        if _being_written(left) or _being_written(left.with_name(left.name.removesuffix(OLD))):
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise UserError where `path` cannot become a file: now rather than when there is something to lose."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it, e.g. {path / 'results.json'}")
    _check_writable(path)


def check_folder(path: str | os.PathLike[str]) -> None:
    """As check_file, where `path` cannot become a folder."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; give a folder as --out")
    _check_writable(path)


def check_whole_folder(path: str | os.PathLike[str]) -> None:
    """As check_folder, where the folder is replaced in one step (atomic_folder)."""
    path = without_link(path)
    if path.resolve() == Path.cwd() or os.path.ismount(path):
        what = "a mount point" if os.path.ismount(path) else "the folder you are in"
        raise UserError(f"{path}: is {what}, which cannot be replaced; give a folder in it, e.g. {path / 'out'}")
    check_folder(path)


def _check_writable(path: Path) -> None:
    """Beside `path`, in the folder that is there already: what is refused leaves no empty folders."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    with plain_disk_errors(path), tempfile.TemporaryFile(dir=there):
        pass


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], name: str = ".lock", *, busy: str | None = None) -> Iterator[None]:
    """Hold `folder`/`name`, a lock that the system takes back from a killed process. busy: what a UserError says while
    another process has it; None: wait for that one. On a file system without locks it holds nobody back."""
    with (Path(folder) / name).open("a") as file:  # not "w", which would change its time
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as error:
            raise UserError(f"{folder}: {busy}") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def make_once(folder: str | os.PathLike[str], make: Callable[[], None]) -> None:
    """Call `make`, which writes `folder` (atomic_folder), where that is missing. Of several processes one does; the
    others wait for it."""
    folder = Path(folder)
    if folder.exists():
        return
    lock = f".{folder.name}.lock"
    with plain_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent, lock):
            if not folder.exists():
                make()
            (folder.parent / lock).unlink(missing_ok=True)  # nobody asks for it any more: the folder is there


def cache_root(given: str | None = None) -> Path:
    """Where graftlm keeps what it can make again: `given`, else $GRAFTLM_CACHE, else ~/.cache/graftlm."""
    return Path(given or os.environ.get("GRAFTLM_CACHE") or "~/.cache/graftlm").expanduser()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically. NaN and Inf are refused: no reader agrees on them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON; a missing or torn file is a UserError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); the file is torn or not ours") from error
