"""The tables of a comparison of ways of pruning: the same rows on the console, as CSV, as LaTeX and in the report."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from graftlm.comparing.tables import Table, average_cells, without_empty
from graftlm.reporting import figures

Row = dict[str, Any]
"""A variant at a size, of comparison.json."""


def tables(summary: dict[str, Any]) -> list[Table]:
    """Perplexity on every text, sizes and costs, tasks."""
    rows = summary["rows"]
    made = [_perplexity(summary, text) for text in summary["texts"]]
    made.append(_costs(rows))
    if any(row["tasks"] for row in rows):
        made.append(_tasks(summary))
    return [without_empty(table) for table in made]


def perplexity(value: Any) -> str:
    """`33.75`, and `2.8e+17` where the digits would say nothing."""
    if not figures.is_number(value):
        return figures.MISSING
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _spread(found: Any) -> str:
    """`33.75 (33.50 to 34.00)`."""
    if not found:
        return figures.MISSING
    ends = f" ({perplexity(found['lowest'])} to {perplexity(found['highest'])})" if len(found["by_seed"]) > 1 else ""
    return perplexity(found["mean"]) + ends


def _times(value: Any) -> str:
    """`0.231`, `1,240`, and `2.8e+17` where the digits would say nothing."""
    if not figures.is_number(value):
        return ""
    return f"{value:,.0f}" if 1e3 <= value < 1e6 else f"{value:.3g}"


def _between(ends: Sequence[float] | None) -> str:
    return f"{_times(ends[0])} to {_times(ends[1])}" if ends else figures.MISSING


def _perplexity(summary: dict[str, Any], text: str) -> Table:
    header = (
        *("size", "variant", "parameters", "trials", "word perplexity", "token perplexity", "times control"),
        *("95% interval (t)", "95% interval (bootstrap)", "lower in", "shown"),
    )
    rows = []
    if original := summary["original"]:
        found = original["perplexity"][text]
        before = (perplexity(found["word_perplexity"]), perplexity(found["token_perplexity"]))
        rows.append(("", "original", figures.count(summary["original_parameters"]), "1", *before, "", "", "", "", ""))
    for row in summary["rows"]:
        found, ratio = row["perplexity"][text], row["perplexity"][text]["ratio"] or {}
        rows.append(
            (
                row["size"],
                row["name"] + (" (control)" if row["control"] else ""),
                figures.count(_of(row, "parameters")),
                str(len(row["parameters"]["by_seed"])) if row["parameters"] else "0",
                _spread(found["word"]),
                _spread(found["token"]),
                _times(ratio.get("mean")),
                _between(ratio.get("t_interval")) if ratio else "",
                _between(ratio.get("bootstrap_interval")) if ratio else "",
                f"{found['lower_in']} of {ratio['n']}" if ratio else "",
                ratio.get("shown", ""),
            )
        )
    note = (
        f"{summary['measured']}. Geometric means over trials (lowest to highest); lower is better. Times control: word "
        "perplexity over that of the control of the same size and seed, geometric mean; intervals are those of the "
        "difference in nats a word. Claims rest on the t interval: the bootstrap's is too narrow for few trials."
    )
    narrow = ("size", "variant", "parameters", "word perplexity", "times control", "95% interval (t)", "shown")
    return Table(f"Perplexity on {text}", header, tuple(rows), note, narrow)


def _costs(rows: Sequence[Row]) -> Table:
    header = (
        *("size", "variant", "parameters", "minus target", "parameters gone", "groups gone", "channels gone"),
        *("tokens trained on", "calibration tokens", "time", "peak memory"),
    )
    made = []
    for row in rows:
        count, target = _of(row, "parameters"), _of(row, "target_parameters")
        over = f"{count - target:+,.0f}".replace("-", "−") if count is not None and target is not None else ""
        made.append(
            (
                row["size"],
                row["name"],
                figures.integer(count),
                over,
                figures.share(_of(row, "gone")),
                *(figures.share((row["components_gone"][kind] or {}).get("mean")) for kind in ("heads", "channels")),
                figures.count(_of(row, "tokens")) if row["tokens"] else "none",
                figures.count(_of(row, "calibration_tokens")),
                figures.duration(_of(row, "seconds")),
                figures.size(_of(row, "peak_memory_bytes")),
            )
        )
    note = (
        "means over trials; parameters of the whole model, its embeddings included; time of pruning and training "
        "alone, calibration tokens those that pruning looked at in it"
    )
    return Table("Sizes and costs", header, tuple(made), note)


def _tasks(summary: dict[str, Any]) -> Table:
    rows = summary["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["tasks"]))
    metric = {name: next(row["tasks"][name]["metric"] for row in rows if name in row["tasks"]) for name in names}
    made = []
    for size, name, row in (("", "original", summary["original"]), *((row["size"], row["name"], row) for row in rows)):
        if row is not None and row["tasks"]:
            scores = [row["tasks"].get(task, {}).get("mean") for task in names]
            made.append((size, name, *map(figures.loss, scores), *average_cells(row)))
    perplexities = any("perplexity" in metric[name] for name in names)
    table = Table(
        "Tasks",
        ("size", "variant", *(f"{name} ({metric[name]})" for name in names), "average", "minus control"),
        tuple(made),
        "means over trials; higher is better"
        + (", of perplexities lower: no average has them" if perplexities else "")
        + "; 95% t intervals over trials, paired: which questions were asked is not in them",
    )
    return without_empty(table)


def _of(row: Row, key: str) -> Any:
    return (row.get(key) or {}).get("mean")


def csv_text(summary: dict[str, Any]) -> str:
    """One line a variant, size and trial, with unrounded numbers."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    keys = ("parameters", "target_parameters", "tokens", "calibration_tokens", "seconds", "peak_memory_bytes")
    texts = [(text, kind) for text in summary["texts"] for kind in ("word", "token")]
    names = list(dict.fromkeys(name for row in summary["rows"] for name in row["tasks"]))
    header = ["size", "variant", "method", "control", "seed", *keys]
    header += [f"{kind}_perplexity {text}" for text, kind in texts] + [f"times_control {t}" for t in summary["texts"]]
    writer.writerow([*header, *names])
    for row in summary["rows"]:
        for seed in (row["parameters"] or {"by_seed": {}})["by_seed"]:
            values = [(row[key] or {"by_seed": {}})["by_seed"].get(seed, "") for key in keys]
            found = [row["perplexity"][text][kind] or {"by_seed": {}} for text, kind in texts]
            ratios = [row["perplexity"][text]["ratio"] or {"by_seed": {}} for text in summary["texts"]]
            scores = [row["tasks"].get(name, {}) for name in names]
            measured = [one.get("by_seed", {}).get(seed, "") for one in (*found, *ratios, *scores)]
            control = "yes" if row["control"] else ""
            writer.writerow([row["size"], row["name"], row["method"], control, seed, *values, *measured])
    return stream.getvalue()
