"""The bar that is shown while steps go by."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def step_bar(console: Console, *, shown: bool = True) -> Progress:
    """Title, bar, steps done of all, figures and time left, on a terminal only. Its tasks have a field `figures`."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    )


def update_interval() -> float:
    """Seconds between updates of a tqdm bar: on a terminal as usual; in a file, which keeps every one, few."""
    return 0.1 if sys.stderr.isatty() else 10.0
