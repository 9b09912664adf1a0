"""What a comparison leaves in its folder: comparison.json, tables as CSV and LaTeX, plots, and report.html."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from graftlm.comparing.plots import alt, draw
from graftlm.comparing.statistics import NO_INTERVAL, TOO_FEW
from graftlm.comparing.tables import Table, csv_text, interval, latex_of, signed, tables
from graftlm.files import write_json, write_text
from graftlm.reporting.page import picture, template


def write_outputs(folder: Path, summary: dict[str, Any]) -> list[Path]:
    """Write everything that is made from comparison.json; returns the files a person may want to open."""
    intro = (
        f"{len(summary['arms'])} arms, seeds {', '.join(map(str, summary['seeds']))}; runs of one seed see the same "
        "tokens in the same order. The control is plain training with the same schedule."
    )
    return write_files(folder, summary, headline(summary), intro, tables(summary), csv_text(summary), draw, alt)


def write_files(
    folder: Path,
    summary: dict[str, Any],
    title: str,
    intro: str,
    shown: Sequence[Table],
    csv_lines: str,
    draw: Callable[[dict[str, Any], Path], Sequence[Path]],
    alt: Callable[[Path], str],
) -> list[Path]:
    """comparison.json, .csv, .tex and report.html of any comparison; returns them. draw: makes its plots in a folder,
    when all numbers are written; alt: says what one of them shows."""
    write_json(folder / "comparison.json", summary)
    write_text(folder / "comparison.csv", csv_lines)
    write_text(folder / "comparison.tex", latex_of(shown))
    context = {
        "title": title,
        "intro": intro,
        "folder": str(folder),
        "summary": summary,
        "plots": [picture(path, alt(path)) for path in draw(summary, folder / "plots")],
        "tables": shown,
        "versions": yaml.safe_dump(summary["versions"], sort_keys=False) if summary["versions"] else "",
    }
    write_text(folder / "report.html", template("compare.html").render(context))
    return [folder / name for name in ("comparison.json", "comparison.csv", "comparison.tex", "report.html")]


def headline(summary: dict[str, Any]) -> str:
    """One sentence that claims no more than what was measured, on all arms that have a control to stand beside."""
    arms = [one for one in summary["arms"] if one.get("difference")]
    if not arms:
        return "Comparison: no arm and its control have both been run yet"
    if len(arms) > 1:
        return _counted(arms)
    (arm,) = arms
    gap = arm["difference"]
    text = f"{arm['name']} minus {arm['matched']}: {signed(gap['mean'])} nats per token"
    if gap["t_interval"] is None:
        why = "too few for an interval" if gap["shown"] == TOO_FEW else "copies of one run"
        return f"{text} ({gap['n']} seeds: {why})"
    words = {"lower": "lower loss", "higher": "higher loss"}.get(gap["shown"], gap["shown"])
    return f"{text} ({interval(gap['t_interval'])}): {words}"


def _counted(arms: Sequence[dict[str, Any]]) -> str:
    """How many arms end lower than their controls, how many higher, and of how many nothing can be said, and why."""
    shown = Counter(arm["difference"]["shown"] for arm in arms)
    controls = "their controls" if len({arm["matched"] for arm in arms}) > 1 else "their control"
    kinds = ("lower", "higher", "no difference shown", *(kind for kind in (TOO_FEW, NO_INTERVAL) if shown[kind]))
    if not any(shown[kind] for kind in kinds[:3]):
        kinds = kinds[3:]
    return f"{len(arms)} arms against {controls}: " + ", ".join(f"{shown[kind]} {kind}" for kind in kinds)
