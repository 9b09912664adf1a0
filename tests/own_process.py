"""Runs in processes of their own, which tests kill; forked from one that has imported everything and trained nothing,
so that a start costs no seconds."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["graftlm.training.run", "graftlm.pruning.shrink.run", "transformers.models.llama.modeling_llama"]
)


def exit_code(target: Callable[..., None], *args: Any, **kwargs: Any) -> int | None:
    """Of `target` in a process of its own; minus the signal that ended it."""
    process = PROCESSES.Process(target=target, args=args, kwargs=kwargs)
    process.start()
    process.join()
    return process.exitcode


def left_alone(
    factory: pytest.TempPathFactory, target: Callable[..., None], make: Callable[[Path, str], Any]
) -> Callable[[str], tuple[Path, int]]:
    """What gives, for a kind of run, the folder of one (`make(folder, kind)`) that was left alone, and how many moments
    it had (tiny_runs.moments); each is run once."""
    done: dict[str, tuple[Path, int]] = {}

    def get(kind: str) -> tuple[Path, int]:
        if kind not in done:
            folder = factory.mktemp(kind)
            assert exit_code(target, make(folder, kind), count_to=folder / "moments") == 0
            done[kind] = folder / "run", int((folder / "moments").read_text())
        return done[kind]

    return get
