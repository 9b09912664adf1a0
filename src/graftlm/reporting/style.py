"""How every plot looks: colours that a colour-blind reader can tell apart, figures without pyplot's global state."""

import itertools
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from graftlm.files import atomic_path
from graftlm.reporting import figures

# Of Okabe and Ito's palette what is seen on white (a contrast of 3 to 1 at least). A method has one colour everywhere:
# plots, report, and its tables.
RUN, CONTROL, BEFORE = "#0072B2", "#D55E00", "#777777"
STRONG, WEAK = "#009E73", "#AA4499"
"""Advantageous (P) and disadvantageous (N) components."""
_OTHERS = ("#CC79A7", "#8C6D00", "#009E73", "#882255", "#000000")
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)))
_WIDEST, _THINNEST = 4.4, 1.6
_FEW = 4
"""Lines of a plot of which each may look as it likes."""
NARROW = 3
"""Times its lowest value that the highest of a logarithmic axis must be."""
INK, FAINT = "#22262b", "#e3e5e8"
DPI = 140
_AT_LEFT: dict[str, Any] = {"x": 0.012, "ha": "left"}


def colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each label: before is grey, the control orange, the run blue; others get what is left, in turn, and
    from the start again where there are many (`lines` tells those apart)."""
    spare = itertools.cycle(_OTHERS)
    chosen: dict[str, str] = {}
    for label in labels:
        if label in ("control", "after control"):
            chosen[label] = CONTROL
        elif label == "before":
            chosen[label] = BEFORE
        elif RUN not in chosen.values():
            chosen[label] = RUN
        else:
            chosen[label] = next(spare)
    return chosen


def lines(chosen: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """How a line is drawn for each label of `chosen` (its colour): so that lines that coincide are all seen.

    The first is wide and solid, each later one above it, thinner, and dashed in a way of its own; a control comes
    first. Of many, only the first is wide, and only colours that come again are dashed. No two labels have both colour
    and dash in common, as far as there are dashes.
    """
    order = sorted(chosen, key=lambda label: chosen[label] != CONTROL)
    few = len(order) <= _FEW
    step = min(0.9, (_WIDEST - _THINNEST) / max(1, len(order) - 1))
    made: dict[str, dict[str, Any]] = {}
    taken: set[tuple[str, Any]] = set()
    for place, label in enumerate(order):
        colour = chosen[label]
        first = place % len(_DASHES) if few else 0
        turned = [*_DASHES[first:], *_DASHES[:first]]
        dash = next((one for one in turned if (colour, one) not in taken), turned[0])
        taken.add((colour, dash))
        width = _THINNEST + step * (len(order) - 1 - place) if few else (_THINNEST if place else 2 * _THINNEST)
        look = {"color": colour, "linewidth": width, "linestyle": dash}
        made[label] = {**look, "zorder": 2 + place / len(order), "label": label}
    return {label: made[label] for label in chosen}


def figure(title: str, *, width: float = 9.0, height: float = 4.8, note: str = "") -> Figure:
    """An empty figure (inches) with what is seen as its title, and a smaller `note` under it."""
    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    lines = textwrap.wrap(title, width=int(width * 9.2))
    under = textwrap.wrap(note, width=int(width * 14.5))
    # The suptitle's empty last lines keep the room for the note; a suptitle itself has one weight and size only.
    made.suptitle("\n".join([*lines, *("" for _ in under)]), **_AT_LEFT, fontsize=12.5, fontweight="bold", color=INK)
    if under:
        top = 1 - (0.12 + 0.21 * len(lines)) / height
        made.text(y=top, s="\n".join(under), **_AT_LEFT, va="top", fontsize=9, color="#5b6168")
    return made


def style(axes: Axes, *, xlabel: str = "", ylabel: str = "", title: str = "") -> Axes:
    """Light grid, no box, labelled axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa0a6")
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.grid(True, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    if xlabel:
        axes.set_xlabel(xlabel, color=INK, fontsize=10)
    if ylabel:
        axes.set_ylabel(ylabel, color=INK, fontsize=10)
    if title:
        axes.set_title(title, loc="left", color=INK, fontsize=10.5)
    return axes


def count_axis(axes: Axes) -> None:
    """Ticks of the x axis as 200 k, 1.5 M."""
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: figures.count(value)))


def log_axis(axis: Axis) -> bool:
    """A logarithmic scale with ticks at plain numbers (1, 2, 5), when what is on the axis has been drawn; returns
    whether it is one. A narrow range, on which hardly a tick would fall, stays linear, as what has no logarithm does.
    """
    low, high = axis.get_data_interval()
    if not (low > 0 and np.isfinite(high) and high >= NARROW * low):
        return False
    axes = axis.axes
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    steps = (1.0,) if high > 1000 * low else (1.0, 2.0, 5.0) if high > 10 * low else (1.0, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e4 else figures.count(value)))
    axis.set_minor_locator(NullLocator())
    return True


def whole_numbers(axis: Axis) -> None:
    """Ticks of an axis of layers or heads: few, and integers."""
    axis.set_major_locator(MaxNLocator(5, integer=True))


def legend(made: Figure, axes: Axes) -> None:
    """One legend under the whole figure, where it hides no data, from what `axes` shows: in as many columns, of at most
    four, as the figure is wide."""
    handles, labels = axes.get_legend_handles_labels()
    look: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9.5, "labelcolor": INK}
    look["handlelength"] = 3.5  # so that dashes are seen to be some
    for columns in range(min(len(labels), 4), 0, -1):
        found = made.legend(handles, labels, ncols=columns, **look)
        made.draw_without_rendering()
        if columns == 1 or found.get_window_extent().width <= made.bbox.width:
            break
        found.remove()


def save(made: Figure, path: Path) -> Path:
    """Write the figure as PNG, atomically; its title is in the file, too, for who cannot see it (`headline_of`)."""
    with atomic_path(path) as temporary:
        made.savefig(temporary, format="png", dpi=DPI, metadata={"Title": " ".join(made.get_suptitle().split())})
    return path


def headline_of(path: Path) -> str:
    """The title of a figure that `save` wrote; empty where the file has none."""
    with Image.open(path) as image:
        return str(image.info.get("Title", ""))
