"""The tables of a comparison: the same rows on the console, as CSV, as LaTeX and in the report."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from graftlm.reporting import figures
from graftlm.reporting.table import wide

Row = dict[str, Any]
"""An arm of comparison.json."""


@dataclass(frozen=True)
class Table:
    """A table as text; the first column is the arms' names."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    narrow: tuple[str, ...] = ()
    """Names of the columns that are shown where a terminal has no room for all; none: always all."""

    @property
    def width(self) -> int:
        """Characters a line that it needs on a console so that no cell is broken; headers are, between words."""
        columns = zip(self.header, *self.rows, strict=True)
        longest = [max(map(len, (*name.split(), *cells)), default=0) for name, *cells in columns]
        return sum(longest) + 3 * len(longest) + 1

    def only(self, columns: Sequence[int]) -> "Table":
        """These columns of it."""
        header, *rows = (tuple(row[i] for i in columns) for row in (self.header, *self.rows))
        return dataclasses.replace(self, header=header, rows=tuple(rows))


def without_empty(table: Table) -> Table:
    """`table` without the columns that say nothing in any row; the first one stays."""
    said = [i for i in range(len(table.header)) if any(row[i] not in ("", figures.MISSING) for row in table.rows)]
    return table.only(sorted({0, *said})) if table.rows else table


def tables(summary: dict[str, Any]) -> list[Table]:
    """Losses, costs, tasks and the choice of learning rates, as far as there is anything to show."""
    arms: Sequence[Row] = summary["arms"]
    made = [_losses(arms), _costs(arms)]
    if any(arm["tasks"] for arm in arms):
        made.append(_tasks(arms))
    if any(arm["rates"] for arm in arms):
        made.append(_rates(arms))
    return [without_empty(table) for table in made]


def signed(value: Any) -> str:
    """A difference in nats with its sign."""
    return figures.signed(value, 5) if figures.is_number(value) else figures.MISSING


def interval(ends: Sequence[float] | None) -> str:
    """`−0.01000 to +0.00020`, or a dash where there is none."""
    return f"{signed(ends[0])} to {signed(ends[1])}" if ends else figures.MISSING


def rate(value: Any) -> str:
    return f"{value:.3g}" if figures.is_number(value) else "by stage"


def _losses(arms: Sequence[Row]) -> Table:
    header = (
        *("arm", "learning rate", "seeds", "held-out loss", "minus control", "95% interval (t)"),
        *("95% interval (bootstrap)", "at the same learning rate", "tokens plain training needs", "shown"),
    )
    rows = []
    for arm in arms:
        loss, gap = arm["loss"], arm.get("difference") or {}
        same = arm.get("difference_at_same_rate") or {}
        rows.append(
            (
                arm["name"],
                rate(arm["learning_rate"]),
                str(len(loss["by_seed"])) if loss else "0",
                figures.loss(loss["mean"]) if loss else figures.MISSING,
                signed(gap.get("mean")) if arm["matched"] else "",
                interval(gap.get("t_interval")) if arm["matched"] else "",
                interval(gap.get("bootstrap_interval")) if arm["matched"] else "",
                signed(same["mean"]) if same else "",
                f"{arm['needed']['text']} ×" if arm.get("needed") else "",
                gap.get("shown", ""),
            )
        )
    note = (
        "nats per token, means over seeds; lower is better. Differences are paired by seed: same tokens, order and "
        "schedule. Claims rest on the t interval: the bootstrap's is too narrow for few seeds."
    )
    if any(arm.get("difference_at_same_rate") for arm in arms):
        note += (
            " At the same learning rate: minus the control's loss at the arm's own rate, where the control's best rate "
            "is another one."
        )
    narrow = ("arm", "held-out loss", "minus control", "95% interval (t)", "shown")
    return Table("Held-out loss", header, tuple(rows), note, narrow)


COSTS_NOTE = (
    "means over seeds; time of training alone, without evaluation; time over control: median of the seeds' ratios "
    "(lowest to highest)"
)


def _costs(arms: Sequence[Row]) -> Table:
    header = (
        "arm",
        "tokens",
        "time",
        "time over control",
        "peak memory",
        "trainable parameters",
        "share of the model's own",
    )
    rows = tuple(
        (
            arm["name"],
            figures.count(_of(arm, "tokens")),
            figures.duration(_of(arm, "seconds")),
            "" if arm["matched"] is None else _time_ratio(arm.get("time_ratio")),
            figures.size(_of(arm, "peak_memory_bytes")),
            figures.count(_of(arm, "trainable_parameters")),
            figures.small_share(_of(arm, "trainable_fraction")),
        )
        for arm in arms
    )
    return Table("What it costs", header, rows, COSTS_NOTE)


def _time_ratio(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return figures.MISSING
    between = f" ({found['lowest']:.2f} to {found['highest']:.2f})" if len(found["by_seed"]) > 1 else ""
    return f"{found['median']:.2f} ×{between}"


def average_cells(row: Row) -> tuple[str, str]:
    """The average over tasks of a row (summary.tasks_average), and what it is above the control's."""
    found = row.get("tasks_average") or {}
    return figures.loss(found.get("mean")), _above(found.get("difference"))


def _above(gap: Mapping[str, Any] | None) -> str:
    if not gap:
        return ""
    return signed(gap["mean"]) + (f" ({interval(gap['t_interval'])})" if gap.get("t_interval") else "")


def _tasks(arms: Sequence[Row]) -> Table:
    names = list(dict.fromkeys(name for arm in arms for name in arm["tasks"]))
    header = ["arm"]
    for name in names:
        metric = next(arm["tasks"][name]["metric"] for arm in arms if name in arm["tasks"])
        header += [f"{name} ({metric})", "minus control"]
    header += ["average", "minus control"]
    rows = []
    for arm in arms:
        row = [arm["name"]]
        for name in names:
            found = arm["tasks"].get(name, {})
            row += [figures.loss(found.get("mean")), _above(found.get("difference"))]
        rows.append((*row, *average_cells(arm)))
    table = Table(
        "Tasks",
        tuple(header),
        tuple(rows),
        "higher is better, of perplexities lower; 95% t intervals over seeds, paired: which questions were asked is "
        f"not in them, and {len(names) * sum(arm['matched'] is not None for arm in arms)} are looked at",
    )
    return without_empty(table)


def _rates(arms: Sequence[Row]) -> Table:
    rows = tuple(
        (
            arm["name"],
            rate(one["rate"]),
            str(one["n"]),
            figures.loss(one["selection_loss"]),
            "chosen" if one["rate"] == arm["learning_rate"] else "",
        )
        for arm in arms
        for one in arm["rates"]
    )
    return Table(
        "Choice of the learning rate",
        ("arm", "learning rate", "seeds", "loss on the selection data", ""),
        rows,
        "on data apart from what is reported",
    )


def _of(arm: Row, key: str) -> Any:
    return (arm.get(key) or {}).get("mean")


# --- forms -----------------------------------------------------------------------------------------------------------


def print_tables(summary: dict[str, Any], console: Console) -> None:
    """All tables and notes of a comparison on the console."""
    show_tables(tables(summary), [*summary["notes"], *(f"failed: {text}" for text in summary["failed"])], console)


def show_tables(shown_tables: Sequence[Table], notes: Sequence[str], console: Console) -> None:
    """Tables and notes on the console; where it is too narrow, a table's most telling columns, and numbers are broken
    but never cut."""
    console = wide(console)
    for table in shown_tables:
        if table.narrow and table.width > console.width:
            table = table.only([i for i, name in enumerate(table.header) if name in table.narrow])
            table = dataclasses.replace(table, note=f"{table.note} The other columns are in report.html.")
        shown = RichTable(title=table.title, title_justify="left", header_style="bold", caption=table.note)
        for number, name in enumerate(table.header):
            shown.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*map(Text, row))
        console.print(shown)
    for note in notes:
        console.print(Text(f"note: {note}"))


def csv_text(summary: dict[str, Any]) -> str:
    """One line an arm and seed, with unrounded numbers: for whoever wants to compute on."""
    stream = io.StringIO()
    keys = ("loss", "loss_start", "tokens", "seconds", "peak_memory_bytes", "trainable_parameters")
    names = list(dict.fromkeys(name for arm in summary["arms"] for name in arm["tasks"]))
    writer = csv.writer(stream, lineterminator="\n")
    scores = [
        f"{name} {next(a['tasks'][name]['metric'] for a in summary['arms'] if name in a['tasks'])}" for name in names
    ]
    writer.writerow(["arm", "method", "control", "learning_rate", "seed", *keys, "minus_control", *scores])
    for arm in summary["arms"]:
        for seed in (arm["loss"] or {"by_seed": {}})["by_seed"]:
            cells = [arm[key]["by_seed"][seed] if arm[key] else "" for key in keys]
            gap = (arm.get("difference") or {"by_seed": {}})["by_seed"].get(seed, "")
            scores = [arm["tasks"].get(name, {}).get("by_seed", {}).get(seed, "") for name in names]
            rate_used = arm["learning_rate"] or ""
            writer.writerow([arm["name"], arm["method"], arm["matched"] or "", rate_used, seed, *cells, gap, *scores])
    return stream.getvalue()


LATEX = {
    **{"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "×": r"$\times$"},
    **{"−": "$-$", "–": "--", "+": "$+$"},
}


def latex_of(shown_tables: Sequence[Table]) -> str:
    """Tables as tabulars with booktabs' rules."""
    parts = ["% needs \\usepackage{booktabs}"]
    for table in shown_tables:
        lines = [
            f"% {table.title}: {table.note}",
            f"\\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
            "\\toprule",
        ]
        lines += [_latex_row(table.header), "\\midrule", *map(_latex_row, table.rows), "\\bottomrule", "\\end{tabular}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _latex_row(row: Sequence[str]) -> str:
    return " & ".join("".join(LATEX.get(letter, letter) for letter in cell) for cell in row) + r" \\"
