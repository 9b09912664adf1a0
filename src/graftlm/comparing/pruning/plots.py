"""The figures of a comparison of ways of pruning: perplexity against parameters, one line a variant."""

from pathlib import Path
from typing import Any

from graftlm.reporting.layers import plot_shares
from graftlm.reporting.style import BEFORE, CONTROL, colours, count_axis, figure, legend, lines, log_axis, save, style


def draw(summary: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what there is to see of comparison.json into `folder`; returns the files."""
    stems = [Path(text).stem for text in summary["texts"]]
    names = [stem if stems.count(stem) == 1 else text for stem, text in zip(stems, summary["texts"], strict=True)]
    made = [
        _perplexity(summary, text, folder / f"perplexity_{name}.png")
        for text, name in zip(summary["texts"], names, strict=True)
    ]
    for number, size in enumerate(dict.fromkeys(row["size"] for row in summary["rows"])):
        shapes = {row["name"]: row["shapes"] for row in summary["rows"] if row["size"] == size and row["shapes"]}
        if shapes:
            title = f"What each layer has left at {size}"
            path = folder / f"layers_{number}.png"
            made.append(plot_shares(shapes, summary["original_shapes"], title, path, _palette(summary)))
    return [path for path in made if path is not None]


def _palette(summary: dict[str, Any]) -> dict[str, str]:
    """One colour a variant, in every figure."""
    names = dict.fromkeys(row["name"] for row in summary["rows"])
    return colours([name for name in names if name != summary["control"]]) | {summary["control"]: CONTROL}


def _perplexity(summary: dict[str, Any], text: str, path: Path) -> Path | None:
    rows = [row for row in summary["rows"] if row["perplexity"][text]["word"]]
    if not rows:
        return None
    names = list(dict.fromkeys(row["name"] for row in rows))
    colour = _palette(summary)
    look = lines({name: colour[name] for name in names})
    made = figure(
        f"Word perplexity on {text} against parameters",
        note=f"{summary['measured']}. Small dots are trials, lines go through their geometric means; lower and further "
        "left is better.",
    )
    axes = made.subplots()
    original = (summary["original"] or {}).get("perplexity", {}).get(text, {}).get("word_perplexity")
    start = [(summary["original_parameters"], original)] if original else []
    for name in names:
        own = [row for row in rows if row["name"] == name]
        points = sorted((row["parameters"]["mean"], row["perplexity"][text]["word"]["mean"]) for row in own) + start
        label = name + (" (control)" if name == summary["control"] else "")
        line = {**look[name], "label": label}
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=5, **line)
        for row in own:
            for seed, value in row["perplexity"][text]["word"]["by_seed"].items():
                count = row["parameters"]["by_seed"][seed]
                axes.plot([count], [value], "o", color=colour[name], markersize=3, alpha=0.5)
    if original:
        axes.plot(*start[0], "*", color=BEFORE, markersize=13, label="original", zorder=5)
    scale = " (log)" if log_axis(axes.yaxis) else ""
    style(axes, xlabel="parameters, embeddings included", ylabel=f"word perplexity{scale}")
    count_axis(axes)
    legend(made, axes)
    return save(made, path)


def alt(path: Path) -> str:
    """What a figure shows, for who cannot see it."""
    if path.stem.startswith("layers"):
        return "Share of attention and of FFN that each layer has left, one line for each variant"
    return "Perplexity against the number of parameters, one line for each variant"
