"""How evenly heads and channels are active: the distributions of the paper's figures 1, 2 and 6 to 9."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.ticker import MaxNLocator

from graftlm.reporting.rundata import KINDS, Activations
from graftlm.reporting.style import colours, figure, legend, lines, log_axis, save, style, whole_numbers

LAYERS = LinearSegmentedColormap.from_list("layers", colormaps["viridis"](np.linspace(0.58, 0, 256)))
"""From the first layer to the last: the part of viridis that is seen on white."""
STRONGEST = 0.1
"""Share of a module's components whose part of the whole activation is told."""
FLOOR = 1e-4
"""Shares of the mean below this are drawn at the lower edge: the plot is about who dominates."""


def sigma(values: np.ndarray) -> float:
    """Standard deviation over a module's components [n] (appendix A.1)."""
    return float(np.std(values.astype(np.float64)))


def relative_sigma(values: np.ndarray) -> float:
    """sigma / mean, which compares between layers and models where raw sigma does not; 0 for a silent module."""
    mean = float(np.mean(values.astype(np.float64)))
    return sigma(values) / mean if mean > 0 else 0.0


def top_share(values: np.ndarray) -> float:
    """Share of a module's whole activation that its strongest components hold (at least one component)."""
    ordered = np.sort(values.astype(np.float64))[::-1]
    total = ordered.sum()
    return float(ordered[: strongest(len(ordered))].sum() / total) if total > 0 else 0.0


def strongest(components: int) -> int:
    """How many of a module's components are its strongest ones."""
    return max(1, round(STRONGEST * components))


def strongest_of(sizes: Iterable[int]) -> str:
    """`1 of 4`, or `10%` where modules are of several sizes."""
    several = set(sizes)
    size = several.pop()
    return f"{STRONGEST:.0%}" if several else f"{strongest(size)} of {size}"


def mean_over_layers(activations: Activations, kind: str, measure: Any) -> dict[str, float]:
    """{when: mean over layers of `measure`}, for the moments that have this kind."""
    return {
        when: float(np.mean([measure(values) for values in kinds[kind].values()]))
        for when, kinds in activations.items()
        if kinds.get(kind)
    }


def plot_activations(activations: Activations, kind: str, path: Path, note: str = "") -> Path | None:
    """Activations of `kind` ("heads" or "channels"), sorted and divided by their layer's mean; one line a layer.

    One panel for each key of `activations`: moments of a run, or models side by side, of which `note` says more. None
    if there is nothing of this kind.
    """
    panels = {when: kinds[kind] for when, kinds in activations.items() if kinds.get(kind)}
    if not panels:
        return None
    held = ", ".join(f"{v:.0%} ({when})" for when, v in mean_over_layers(activations, kind, top_share).items())
    said = strongest_of(len(values) for layers in panels.values() for values in layers.values())
    made = figure(
        f"In a layer, the strongest {said} {kind} hold{'s' if said.startswith('1 of') else ''} on average {held}",
        width=max(6.0, 3.3 * len(panels)),
        height=4.6,
        note=f"of the module's activation (mean over samples of the squared norm){'. ' if note else ''}{note}",
    )
    grid = made.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    depth = Normalize(0, max(1, max(max(layers) for layers in panels.values())))
    shading = ScalarMappable(depth, LAYERS)
    for axes, (when, layers) in zip(grid, panels.items(), strict=True):
        for layer, values in layers.items():
            ordered = np.sort(values.astype(np.float64))[::-1]
            n, mean = len(ordered), ordered.mean()
            if mean <= 0:
                continue
            axes.plot(
                np.arange(1, n + 1) if kind == "heads" else (np.arange(n) + 0.5) / n * 100,
                np.maximum(ordered / mean, FLOOR),
                color=shading.to_rgba(np.array(layer)),  # type: ignore[arg-type]
                linewidth=1.1,
                marker="o" if kind == "heads" else None,
                markersize=3,
            )
        axes.axhline(1, color="#22262b", linewidth=0.8, linestyle="--")
        whole_numbers(axes.xaxis)
        style(axes, xlabel="head, strongest first" if kind == "heads" else f"{kind}, strongest first (%)", title=when)
    log_axis(grid[0].yaxis)  # of all panels, which share it
    style(grid[0], ylabel="activation / layer's mean")
    bar = made.colorbar(shading, ax=list(grid), label="layer", pad=0.01, aspect=30)
    bar.locator = MaxNLocator(5, integer=True)
    bar.update_ticks()
    return save(made, path)


def plot_sigma(activations: Activations, path: Path, note: str = "") -> Path | None:
    """sigma and sigma / mean of every layer's heads and channels, one line for each key, of which `note` says more;
    None if there is nothing."""
    kinds = [kind for kind in KINDS if any(found.get(kind) for found in activations.values())]
    if not kinds:
        return None
    said = [
        f"{kind} "
        + ", ".join(f"{v:.2f} {when}" for when, v in mean_over_layers(activations, kind, relative_sigma).items())
        for kind in kinds
    ]
    made = figure(
        "Mean of σ/mean over layers: " + "; ".join(said),
        height=6.2,
        note=f"Lower is more even. σ: standard deviation over a module's components of the mean activation. {note}",
    )
    grid = made.subplots(2, len(kinds), sharex="col", squeeze=False)
    look = lines(colours(activations))
    for column, kind in enumerate(kinds):
        for row, measure in enumerate((sigma, relative_sigma)):
            axes = grid[row][column]
            for when, found in activations.items():
                layers = found.get(kind, {})
                values = [measure(values) for values in layers.values()]
                axes.plot(list(layers), values, marker="o", markersize=3.5, **look[when])
            if row == 0 and _spans_decades(axes):
                log_axis(axes.yaxis)
            whole_numbers(axes.xaxis)
            style(
                axes,
                xlabel="layer" if row else "",
                ylabel=("σ/mean" if row else "σ") if column == 0 else "",
                title="" if row else kind.capitalize(),
            )
    legend(made, grid[0][0])
    return save(made, path)


def _spans_decades(axes: Any) -> bool:
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    return bool(values.size and values.min() > 0 and values.max() > 30 * values.min())
