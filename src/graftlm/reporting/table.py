"""The table that a run ends with on the console."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graftlm.reporting import figures
from graftlm.reporting.nextsteps import commands

WIDE = 250
"""Characters a line that tables may take in a file."""


def wide(console: Console) -> Console:
    """For tables: `console`, or where that is no terminal one with room for them (rich takes 80 characters for the
    width of a file, and would cut numbers off)."""
    return console if console.is_terminal else Console(file=console.file, width=max(console.width, WIDE))


def print_summary(summary: dict[str, Any], run: Path, *, console: Console | None = None) -> None:
    """Print a run beside its control, then where its report lies and what can be done next.

    `summary` is summary.json's content; `run` the run folder, as the person named it.
    """
    console = console or Console()
    control = summary.get("control")
    name = figures.method_name(summary.get("method"))
    table = Table(header_style="bold")
    table.add_column("")
    table.add_column(name, justify="right", style="blue")
    if control:
        table.add_column("control", justify="right", style="dark_orange")
        table.add_column(f"{name} against control", justify="right")
    previous = False
    for row in figures.comparison(summary, control):
        if row.cost and not previous:
            table.add_section()
        previous = row.cost
        table.add_row(row.label, row.run, *([row.control, row.compared] if control else []))
    console.print(Text(figures.verdict(summary, control), style="bold"))
    console.print(table)
    if control:
        console.print(Text(figures.ONE_SEED, style="dim"))
    for note in summary.get("notes") or []:
        console.print(Text(f"note: {note}"))
    lines = [("report", str(run / "report.html")), ("model", str(run / "model")), *commands(run)]
    for what, text in lines:
        # Text and no_wrap: a path is no markup, and must survive being copied.
        console.print(Text(f"{what + ':':32}{text}"), soft_wrap=True)
