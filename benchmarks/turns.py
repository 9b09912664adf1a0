"""Ways of training that take steps in turn, each in a process of its own.

In turn, so that a machine whose speed drifts slows all alike; apart, so that each has its own peak of memory.
"""

import argparse
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from graftlm.environment import peak_memory_bytes


def synchronize() -> None:
    """Wait for the GPU, where there is one: what was asked of it has then been done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Turn:
    """A way's end of the pipe: it says that it is ready, and takes a step each time it is asked to."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe
        self.noted: dict[str, float] = {}
        """What a step measured of itself; cleared when the next begins."""

    def ready(self, **said: Any) -> None:
        """Everything is loaded; `said` is what the benchmark should know (trainable parameters, say)."""
        self._pipe.send(said)

    def steps(self) -> Iterator[int]:
        """Numbers of the steps to take. A step's time lasts until the next is asked for."""
        for step in iter(self._pipe.recv, None):
            self.noted = {}
            synchronize()
            begin = time.perf_counter()
            yield step
            synchronize()
            seconds = time.perf_counter() - begin
            reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
            memory = {"peak_bytes": peak_memory_bytes(), "reserved_bytes": reserved}
            self._pipe.send({"seconds": seconds, **memory, **self.noted})


Way = Callable[[str, argparse.Namespace, Turn], None]
"""Loads what its name says, calls turn.ready() and takes one optimizer step for each of turn.steps()."""


@dataclass
class Record:
    """What one way said and measured, without its first step."""

    said: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)

    def values(self, key: str = "seconds") -> list[float]:
        return [step[key] for step in self.steps]

    def median(self, key: str = "seconds") -> float:
        return statistics.median(self.values(key))

    @property
    def peak_bytes(self) -> int:
        return int(self.steps[-1]["peak_bytes"])


def _work(way: Way, name: str, options: argparse.Namespace, pipe: Connection) -> None:
    torch.manual_seed(0)
    way(name, options, Turn(pipe))


def take_turns(way: Way, names: Sequence[str], options: argparse.Namespace, rounds: int) -> dict[str, Record]:
    """`rounds` counted steps of each way, after one that is not; a way that fails ends the benchmark with its error."""
    context = multiprocessing.get_context("spawn")
    records = {name: Record() for name in names}
    pipes: dict[str, Any] = {}
    processes = []

    def answer(name: str) -> Any:
        try:
            return pipes[name].recv()
        except EOFError:
            sys.exit(f"{name} stopped; its error is above")

    for name in names:  # one after the other, or loading two models at once would disturb both
        pipes[name], child = context.Pipe()
        processes.append(context.Process(target=_work, args=(way, name, options, child), daemon=True))
        processes[-1].start()
        child.close()  # or its end would stay open here, and a dead process would never read as one
        records[name].said = answer(name)
    for step in range(rounds + 1):
        for name in names if step % 2 else list(names)[::-1]:  # none always goes first
            pipes[name].send(step)
            measured = answer(name)
            if step > 0:
                records[name].steps.append(measured)
        if step > 0:
            taken = "  ".join(f"{name} {record.steps[-1]['seconds']:.3f} s" for name, record in records.items())
            print(taken, file=sys.stderr, flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    return records


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def step_ratio(key: str, one: Record, other: Record) -> dict[str, Any]:
    """Median of the ratios of neighbouring steps, as `key`, and its interval, as `key`_interval."""
    ratios = [a / b for a, b in zip(one.values(), other.values(), strict=True)]
    return {key: round(statistics.median(ratios), 4), f"{key}_interval": [round(x, 4) for x in interval(ratios)]}
