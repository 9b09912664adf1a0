"""Running generated programs: each in a process of its own that can only compute, and is killed when its time is up."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from graftlm.environment import usable_processors
from graftlm.errors import UserError
from graftlm.evaluation import contained
from graftlm.progress import update_interval

SECONDS = 10
"""Of processor time, and twice as many by the clock, for on a busy machine a program gets only a part of it."""
MEMORY = 2**30
"""Bytes of address space."""


def passes(program: str, *, seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Whether the Python `program` runs to its end without an exception, contained.

    It gets no network, no second process or thread, no file to write to, `seconds` of processor time (and twice that
    by the clock), `memory` bytes, an empty environment and an empty folder. Whatever it tries beyond that fails.
    Raises UserError where this machine cannot contain it (only Linux on x86-64 and arm64 can).
    """
    token = secrets.token_hex(16)
    task = {"program": program, "seconds": seconds, "memory": memory, "token": token}
    with tempfile.TemporaryDirectory(prefix="graftlm-program-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(contained.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps(task).encode())
            process.wait(timeout=2 * seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        with process.stdout:  # only so much: a program may have filled the pipe, and then it waits until it is killed
            written = process.stdout.read(len(token) + 1)
    if process.returncode == contained.CANNOT_CONTAIN:
        raise UserError("generated programs cannot be contained on this machine (it takes Linux on x86-64 or arm64)")
    return process.returncode == 0 and written == token.encode()


def check_containment() -> None:
    """Raise UserError where generated programs cannot be contained, before any is generated."""
    if not passes("pass"):
        raise UserError("a contained process that does nothing failed; generated programs cannot be judged here")


def judge(programs: Sequence[str], *, progress: bool = False, workers: int | None = None) -> list[bool]:
    """`passes` of many programs, several at a time (`workers`; None: one a processor)."""
    with (
        ThreadPoolExecutor(workers or usable_processors()) as pool,
        tqdm(
            total=len(programs),
            unit=" programs",
            desc="running",
            disable=not progress,
            mininterval=update_interval(),
        ) as bar,
    ):
        verdicts = []
        for verdict in pool.map(passes, programs):
            verdicts.append(verdict)
            bar.update()
    return verdicts
