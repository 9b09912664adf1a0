"""What every comparison does with its open cells: one after another, each in a process of its own, until nothing is
open or the time is up."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.table import Table

from graftlm.comparing.process import OutOfTime, RunFailed
from graftlm.errors import UserError
from graftlm.files import locked
from graftlm.reporting import figures


class Named(Protocol):
    """A cell, as far as the loop knows it."""

    @property
    def title(self) -> str: ...

    @property
    def key(self) -> str: ...


CellT = TypeVar("CellT", bound=Named)
Say = Callable[[str], None]


def run_open(
    todo: Callable[[], list[CellT]],
    guesses: Callable[[], Callable[[CellT], float]],
    run: Callable[[CellT, float | None, Say], str],
    failed: dict[str, str],
    minutes: float | None,
    console: Console,
) -> None:
    """Run open cells in order, for so many minutes. A failed one is put into `failed` (key: why); the others go on.

    todo: what is open now. guesses: made anew before each cell; seconds that a cell will take, 0 if nothing is known.
    run: runs a cell in at most so many seconds, keeps its record, and returns what to say of it.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    while cells := todo():
        left = None if end is None else end - time.monotonic()
        still = guesses()
        cell = next((one for one in cells if left is None or still(one) < left), None)
        if cell is None or (left is not None and left <= 0):
            shortest = figures.duration(min(map(still, cells)))
            rest = (
                f"; of {minutes:g} min {figures.duration(left)} are left, and the shortest run takes about {shortest}"
            )
            console.print("the time is up" + (rest if cell is None else ""), highlight=False)
            return
        with console.status(cell.title) as status:

            def say(line: str, status: Any = status, title: str = cell.title) -> None:
                status.update(f"{title}: {line[:100]}")

            try:
                told = run(cell, left, say)
            except OutOfTime:
                console.print(f"the time is up; {cell.title} is next", highlight=False)
                return
            except RunFailed as error:
                failed[cell.key] = f"{cell.title}: {error}"
                console.print(f"failed: {failed[cell.key]}", highlight=False, markup=False)
                continue
        console.print(f"{cell.title}: {told} ({len(todo())} known runs left)", highlight=False, soft_wrap=True)


def print_plan(
    cells: Iterable[tuple[str, float | None, float | None]], notes: Iterable[str], console: Console, *, later: str = ""
) -> None:
    """List runs: title, seconds that it took (None: to be run), seconds that it is guessed to take (None: unknown).
    later: of runs that cannot be named yet."""
    table = Table(header_style="bold")
    for name in ("run", "state", "about"):
        table.add_column(name, overflow="fold")
    left: list[float | None] = []
    for title, taken, guess in cells:
        if taken is None:
            left.append(guess)
        finished = taken is not None
        table.add_row(title, "finished" if finished else "to run", figures.duration(taken if finished else guess))
    console.print(table)
    known = [guess for guess in left if guess is not None]
    of_some = f" for {len(known)} of them" if len(known) < len(left) else ""
    time_left = f", about {figures.duration(sum(known))}{of_some}" if known else ", time unknown" if left else ""
    now = " now" if later else ""
    console.print(f"{len(left)} to run{now}{time_left}{later}", highlight=False)
    for note in notes:
        console.print(f"note: {note}", highlight=False)


def alone(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Refuse to run beside another process in the same folder."""
    return locked(folder, busy="another comparison is running there; wait, or give another output_dir")


def close(
    written: Iterable[Path], left: Sequence[Named], failed: Mapping[str, str], folder: Path, console: Console
) -> None:
    """Say where everything lies and what is left to run. Raises UserError where cells failed."""
    for file in written:
        console.print(str(file), soft_wrap=True, highlight=False)
    if left:
        console.print(f"left to run: {len(left)}, {left[0].title} next; the same command goes on", highlight=False)
    if failed:
        raise UserError(
            f"{len(failed)} of the comparison's runs failed: {next(iter(failed.values()))}; the others are in "
            f"{folder}, and the same command tries the failed ones again"
        )
