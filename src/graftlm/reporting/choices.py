"""Which components each stage chose (P and N), and how many of them the next stage keeps."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from graftlm.reporting.rundata import KINDS
from graftlm.reporting.style import BEFORE, INK, STRONG, WEAK, figure, legend, save, style, whole_numbers

SETS = {"advantageous": ("P", STRONG), "disadvantageous": ("N", WEAK)}


def kept(stages: list[dict[str, Any]], kind: str, which: str) -> np.ndarray:
    """Share [transitions, layers] of a set that was in the same set one stage before."""
    shares = []
    for before, now in pairwise(stages):
        pairs = [(set(before[kind][layer][which]), set(chosen[which])) for layer, chosen in _layers(now, kind)]
        shares.append([len(old & new) / len(new) if new else np.nan for old, new in pairs])
    return np.array(shares, dtype=np.float64)


def plot_stages(stages: list[dict[str, Any]], path: Path) -> Path | None:
    """Heads chosen per layer over all stages, and the share of P and N kept from stage to stage.

    `stages` is the summary's list. None if there is nothing to see: no stages, or one stage without heads.
    """
    with_heads = bool(stages) and bool(stages[0].get("heads"))
    kinds = [kind for kind in KINDS if len(stages) > 1 and all(stage.get(kind) for stage in stages)]
    if not with_heads and not kinds:
        return None
    note = "P: advantageous, N: disadvantageous components."
    if kinds:
        note += " A line is the mean over stage changes, the band their range; dashed: what chance would keep."
    if with_heads and (heads_chosen(stages) > 0).all(axis=0).any():
        note += " ×: in P in one stage, in N in another."
    made = figure(_title(stages, kinds), width=3.4 + 3.2 * len(kinds) if kinds else 6.0, height=4.6, note=note)
    grid = made.subplots(1, with_heads + len(kinds), squeeze=False)[0]
    if with_heads:
        _heads_map(made, grid[0], stages)
    for axes, kind in zip(grid[int(with_heads) :], kinds, strict=True):
        layers = [int(layer) for layer, _ in _layers(stages[0], kind)]
        for which, (name, colour) in SETS.items():
            shares = 100 * kept(stages, kind, which)
            axes.plot(layers, shares.mean(axis=0), color=colour, marker="o", markersize=3.5, label=name)
            axes.fill_between(layers, shares.min(axis=0), shares.max(axis=0), color=colour, alpha=0.18, linewidth=0)
        if chance := _chance(stages, kind):
            axes.axhline(100 * chance, color=BEFORE, linewidth=1.2, linestyle="--")
        axes.set_ylim(-3, 103)
        whole_numbers(axes.xaxis)
        style(axes, xlabel="layer", ylabel="kept from the stage before (%)", title=kind.capitalize())
    if kinds:
        legend(made, grid[-1])
    return save(made, path)


def _layers(stage: dict[str, Any], kind: str) -> list[tuple[str, dict[str, list[int]]]]:
    """Layers of a stage in the order of their number: JSON keys are strings, and "10" sorts before "2"."""
    return sorted(stage[kind].items(), key=lambda item: int(item[0]))


def _chance(stages: list[dict[str, Any]], kind: str) -> float | None:
    """Share that two sets drawn at random would have in common: the effective K."""
    return (stages[-1].get("effective_k") or {}).get(kind)


def _title(stages: list[dict[str, Any]], kinds: list[str]) -> str:
    if not kinds:
        return "One stage: the heads it chose in each layer"
    said = []
    for kind in kinds:
        p, n = (np.nanmean(kept(stages, kind, which)) for which in SETS)
        chance = _chance(stages, kind)
        said.append(f"{kind} P {p:.0%}, N {n:.0%}" + (f" (by chance {chance:.0%})" if chance else ""))
    return "Kept from stage to stage: " + "; ".join(said)


def heads_chosen(stages: list[dict[str, Any]]) -> np.ndarray:
    """In how many stages each head was in P, and in N: int64 [2, layers, heads]."""
    layers = [layer for layer, _ in _layers(stages[0], "heads")]
    chosen = [choice for stage in stages for choice in stage["heads"].values()]
    width = 1 + max(max(choice["advantageous"] + choice["disadvantageous"]) for choice in chosen)
    if chance := _chance(stages, "heads"):  # heads at the end that no stage chose belong in the map too
        width = max(width, round(len(chosen[-1]["advantageous"]) / chance))
    table = np.zeros((len(SETS), len(layers), width), dtype=np.int64)
    for stage in stages:
        for row, layer in enumerate(layers):
            for number, which in enumerate(SETS):
                table[number, row, stage["heads"][layer][which]] += 1
    return table


def _heads_map(made: Figure, axes: Axes, stages: list[dict[str, Any]]) -> None:
    """A cell per layer and head: in how many stages it was in P, minus in how many in N; a cross where in both."""
    p, n = heads_chosen(stages)
    limit = len(stages)
    diverging = LinearSegmentedColormap.from_list("choices", [WEAK, "#f4f4f4", STRONG])
    image = axes.imshow(p - n, cmap=diverging, vmin=-limit, vmax=limit, aspect="auto", origin="lower")
    rows, columns = np.nonzero((p > 0) & (n > 0))
    axes.plot(columns, rows, linestyle="none", marker="x", markersize=4, color=INK)
    style(axes, xlabel="head, or key-value group", ylabel="layer", title="Heads chosen")
    axes.grid(False)
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
    bar = made.colorbar(image, ax=axes, aspect=30, pad=0.02, ticks=[-limit, 0, limit])
    bar.ax.set_yticklabels(["always N", "neither", "always P"] if limit > 1 else ["N", "neither", "P"])
    bar.ax.tick_params(labelsize=8)
