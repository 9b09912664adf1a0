"""What a comparison of ways of pruning leaves in its folder: the same files as one of ways of training."""

from pathlib import Path
from typing import Any

from graftlm.comparing.pruning.plots import alt, draw
from graftlm.comparing.pruning.tables import csv_text, perplexity, tables
from graftlm.comparing.report import write_files
from graftlm.comparing.statistics import TOO_FEW


def write_outputs(folder: Path, summary: dict[str, Any]) -> list[Path]:
    """Write everything that is made from comparison.json; returns the files a person may want to open."""
    variants = len({row["name"] for row in summary["rows"]})
    intro = (
        f"{variants} ways of pruning, trials {', '.join(map(str, summary['seeds']))}; variants of one trial draw the "
        f"same calibration sequences. Ratios are to {summary['control']}."
    )
    return write_files(folder, summary, headline(summary), intro, tables(summary), csv_text(summary), draw, alt)


def headline(summary: dict[str, Any]) -> str:
    """One sentence that claims no more than what was measured, on the first variant that has a control beside it."""
    text = summary["texts"][0]
    row = next((one for one in summary["rows"] if one["perplexity"][text]["ratio"]), None)
    if row is None:
        return "Comparison: no variant and its control have both been run yet"
    ratio, found = row["perplexity"][text]["ratio"], row["perplexity"][text]
    said = f"{row['name']} at {row['size']}: word perplexity {perplexity(found['word']['mean'])}, lower than "
    said += f"{summary['control']}'s in {found['lower_in']} of {ratio['n']} trials"
    if ratio["t_interval"] is None:
        few = ratio["shown"] == TOO_FEW
        return said + (" (too few for an interval)" if few else " (copies of one model: no interval)")
    return said + ("" if ratio["shown"] in ("lower", "higher") else f" ({ratio['shown']})")
