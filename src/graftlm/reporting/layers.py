"""Pictures of a pruned model: what each layer has left, and how that came about (Adapt-Pruner, fig. 1)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from graftlm.reporting import figures
from graftlm.reporting.style import (
    BEFORE,
    RUN,
    STRONG,
    colours,
    figure,
    legend,
    lines,
    log_axis,
    save,
    style,
    whole_numbers,
)

Shape = Mapping[str, int]
"""A layer's widths: num_attention_heads, num_key_value_heads, intermediate_size."""
PARTS = {"attention": "num_key_value_heads", "FFN": "intermediate_size"}
UNITS = {"attention": "key-value groups", "FFN": "channels"}


def widths(shapes: Sequence[Shape], part: str) -> np.ndarray:
    """Key-value groups or channels of every layer: float64 [layers]."""
    return np.array([shape[PARTS[part]] for shape in shapes], dtype=np.float64)


def plot_layers(
    shapes: Sequence[Shape], original: Sequence[Shape], path: Path, costs: Mapping[str, int] | None = None
) -> Path:
    """What every layer has left of its attention and of its FFN, in front of what the original has.

    costs: parameters of a key-value group (attention) and of a channel (FFN); None: bars count components.
    """
    gone = len(original) - len(shapes)
    made = figure(
        "Parameters of every layer, against the original's" if costs else "What every layer has left",
        width=10.0,
        height=4.4,
        note="Grey: the original." + (f" {gone} whole layers went; the others are numbered anew." if gone else ""),
    )
    for axes, part, colour in zip(made.subplots(1, 2), PARTS, (RUN, STRONG), strict=True):
        cost = costs[part] if costs else 1
        now, before = widths(shapes, part) * cost, widths(original, part) * cost
        axes.bar(range(len(before)), before, color=BEFORE, alpha=0.25, width=0.86)
        axes.bar(range(len(now)), now, color=colour, width=0.86)
        left = now.sum() / before.sum() if before.sum() else 0.0
        style(axes, xlabel="layer", ylabel="parameters" if costs else UNITS[part], title=f"{part}: {left:.1%} left")
        if costs:
            axes.yaxis.set_major_formatter(lambda value, _: figures.count(value))
        whole_numbers(axes.xaxis)
    return save(made, path)


def plot_whole_layers(parameters: Sequence[int], original: Sequence[int], path: Path) -> Path:
    """What every layer has left of its parameters, attention and FFN together, in front of what the original has."""
    title = "Parameters of every layer, against the original's"
    made = figure(title, width=7.0, height=4.4, note="Grey: the original.")
    axes = made.subplots()
    axes.bar(range(len(original)), original, color=BEFORE, alpha=0.25, width=0.86)
    axes.bar(range(len(parameters)), parameters, color=RUN, width=0.86)
    left = f"attention and FFN: {sum(parameters) / sum(original):.1%} left"
    style(axes, xlabel="layer", ylabel="parameters", title=left)
    axes.yaxis.set_major_formatter(lambda value, _: figures.count(value))
    whole_numbers(axes.xaxis)
    return save(made, path)


def plot_shares(
    models: Mapping[str, Sequence[Shape]],
    original: Sequence[Shape],
    title: str,
    path: Path,
    palette: Mapping[str, str] | None = None,
) -> Path:
    """Share of its components that each layer of each model has left; models that have lost whole layers, or none of
    any layer's components (a sliced hidden size), are named as left out. palette: colours by model, where other
    pictures show them too. Models of the same shares have one line, named `a = b`."""
    before = [widths(original, part).tolist() for part in PARTS]
    out = [
        label
        for label, shapes in models.items()
        if len(shapes) != len(original) or [widths(shapes, part).tolist() for part in PARTS] == before
    ]
    note = "Of the first trial."
    if out:
        note += f" Not drawn, as they lost whole layers or a part of the hidden size: {', '.join(out)}."
    made = figure(title, width=10.0, height=4.4, note=note)
    palette = palette or colours(models)
    groups: dict[tuple[tuple[float, ...], ...], list[str]] = {}  # labels, by the shares of both parts
    for label, shapes in models.items():
        if label not in out:
            left = (widths(shapes, part) / np.maximum(1, widths(original, part)) for part in PARTS)
            groups.setdefault(tuple(tuple(one.tolist()) for one in left), []).append(label)
    look = lines({" = ".join(labels): palette[labels[0]] for labels in groups.values()})
    grid = made.subplots(1, 2, sharey=True)
    for number, (axes, part) in enumerate(zip(grid, PARTS, strict=True)):
        for shares, labels in groups.items():
            axes.plot(shares[number], marker="o", markersize=3, **look[" = ".join(labels)])
        axes.set_ylim(-0.03, 1.05)
        style(axes, xlabel="layer", ylabel="" if part == "FFN" else "share left", title=part)
        whole_numbers(axes.xaxis)
    legend(made, grid[0])
    return save(made, path)


def plot_iterations(
    steps: Sequence[Mapping[str, Any]],
    original: Sequence[Shape],
    original_parameters: int,
    path: Path,
    *,
    unit: str = "iteration",
) -> Path | None:
    """Layer importance and what each layer has left, by iteration, and the size of the model. None for fewer than two
    iterations, or if layers went. unit: what `steps` are called, each numbered under that key."""
    if len(steps) < 2 or any(len(step["shapes"]) != len(original) for step in steps):
        return None
    iterations = [step[unit] for step in steps]
    pictures: dict[str, tuple[np.ndarray, str]] = {}  # [layers, iterations], colour map
    known = [step["layer_importance"] for step in steps]
    if all(one is not None and len(one) == len(original) for one in known):
        pictures["importance of layers"] = np.array(known).T, "RdBu_r"
    for part in PARTS:
        before = np.maximum(1, widths(original, part))
        pictures[f"share left: {part}"] = np.array([widths(s["shapes"], part) / before for s in steps]).T, "viridis"
    start, end = map(figures.close_count, (original_parameters, steps[-1]["parameters"]))
    title = f"{start} to {end} parameters in {len(steps)} {unit}s"
    made = figure(title, width=9.0, height=7.0)
    grid = made.subplots(2, 2).ravel()
    last = grid[len(pictures)]
    for axes in grid[len(pictures) + 1 :]:  # where no importance is known
        axes.remove()
    for axes, (title, (values, colour)) in zip(grid, pictures.items(), strict=False):
        _picture(axes, values, iterations, title, colour, unit)
    sizes = [original_parameters, *(step["parameters"] for step in steps)]
    last.plot([iterations[0] - 1, *iterations], sizes, color=RUN, linewidth=1.8)
    last.yaxis.set_major_formatter(lambda value, _: figures.count(value))
    whole_numbers(last.xaxis)
    style(last, xlabel=unit, title="parameters of the model")
    return save(made, path)


def _picture(axes: Axes, values: np.ndarray, iterations: Sequence[int], title: str, colour: str, unit: str) -> None:
    low, high = (-1.0, 1.0) if colour == "RdBu_r" else (0.0, 1.0)
    extent = (iterations[0] - 0.5, iterations[-1] + 0.5, -0.5, len(values) - 0.5)
    shown = axes.imshow(
        values, aspect="auto", origin="lower", cmap=colour, vmin=low, vmax=high, extent=extent, interpolation="nearest"
    )
    style(axes, xlabel=unit, ylabel="layer", title=title)
    axes.grid(False)
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
    bar = axes.figure.colorbar(shown, ax=axes, shrink=0.85)
    bar.ax.tick_params(labelsize=8)


def plot_sensitivity(found: Mapping[str, Any], path: Path, label: str = "", note: str = "") -> Path:
    """Perplexity without a share of one layer's components at a time, over the layer (Adapt-Pruner, fig. 1, above);
    `found`: as pruning.sensitivity.layer_sensitivity gives it. `label`: the model; `note` says more of it."""
    worst = max(found["layers"], key=lambda one: one["loss"])
    made = figure(
        f"{label}{': p' if label else 'P'}erplexity without {found['share']:.0%} of one layer: layer {worst['layer']} "
        "is missed most",
        note="Without the key-value groups and channels of the least first-order importance, one layer at a time. "
        + note,
    )
    axes = made.subplots()
    # exp overflows a double above 709.
    values = [np.exp(min(one["loss"], 700.0)) for one in found["layers"]]
    axes.plot(range(len(values)), values, color=RUN, marker="o", markersize=4, linewidth=1.8, label="one layer")
    lines = [
        ("nothing gone", found["none"]),
        *((f"{one['share']:.0%} of every layer", one) for one in found["uniform"]),
    ]
    for (label, one), dash in zip(lines, ("-", "--", ":"), strict=False):
        value = np.exp(min(one["loss"], 700.0))
        axes.axhline(value, color=BEFORE, linestyle=dash, linewidth=1.2, label=f"{label}: {value:.4g}")
    scale = " (log)" if log_axis(axes.yaxis) else ""
    style(axes, xlabel="layer", ylabel=f"token perplexity{scale}")
    whole_numbers(axes.xaxis)
    legend(made, axes)
    return save(made, path)
