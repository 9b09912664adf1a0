"""How every plot looks: colours that a colour-blind reader can tell apart, figures without pyplot's global state."""

import itertools
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from graftlm.files import atomic_path
from graftlm.reporting import figures

# Okabe and Ito's palette. A method has one colour everywhere: plots, report, and its tables.
RUN, CONTROL, BEFORE = "#0072B2", "#D55E00", "#777777"
STRONG, WEAK = "#009E73", "#AA4499"
"""Advantageous (P) and disadvantageous (N) components."""
_OTHERS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#000000")
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)))
INK, FAINT = "#22262b", "#e3e5e8"
DPI = 140
_AT_LEFT: dict[str, Any] = {"x": 0.012, "ha": "left"}


def colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each label: before is grey, the control orange, the run blue; others get what is left, in turn, and
    from the start again where there are many (`dashes` tells those apart)."""
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


def dashes(chosen: Mapping[str, str]) -> dict[str, Any]:
    """A line style for each label, another one for each that has the same colour."""
    seen: Counter[str] = Counter()
    styles: dict[str, Any] = {}
    for label, colour in chosen.items():
        styles[label] = _DASHES[seen[colour] % len(_DASHES)]
        seen[colour] += 1
    return styles


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
    """Write the figure as PNG, atomically."""
    with atomic_path(path) as temporary:
        made.savefig(temporary, format="png", dpi=DPI)
    return path
