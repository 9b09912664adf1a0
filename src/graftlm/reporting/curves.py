"""Curves of a run beside its control: losses, learning rate, gradient norm."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from graftlm.reporting import figures
from graftlm.reporting.rundata import RunData
from graftlm.reporting.style import BEFORE, CONTROL, RUN, count_axis, figure, legend, lines, log_axis, save, style

XLABELS = {"tokens": "tokens trained on", "seconds": "time (s)"}


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Exponential moving average [n] of `values` [n], without the bias of its start; span 1 changes nothing."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    smoothed = np.empty_like(values)
    for index, value in enumerate(values):
        if np.isfinite(value):  # one NaN must not swallow the rest of the curve
            total, weight = keep * total + value, keep * weight + 1
        smoothed[index] = total / weight if weight else np.nan
    return smoothed


def _span(values: np.ndarray) -> int:
    """Over how many points a curve of them is averaged; 1: not at all."""
    return max(1, len(values) // 20)


def plot_loss(run: RunData, x: Literal["tokens", "seconds"], path: Path) -> Path | None:
    """Training and evaluation loss against tokens or seconds; None if nothing was logged yet.

    Against tokens, with a control, a second row shows run minus control: both saw the same tokens in the same order, so
    the noise of the data is gone from the difference.
    """
    if not run.metrics:
        return None
    paired = x == "tokens" and run.control is not None and bool(run.control.metrics)
    title = figures.verdict(run.outcome, run.control.outcome if run.control else None)
    if x == "seconds":
        title = _time_title(run)
    made = figure(title, height=5.6 if paired else 4.4, note=_note(run))
    grid: Any = made.subplots(
        2 if paired else 1, 2, sharex="col", squeeze=False, height_ratios=[2.4, 1] if paired else [1]
    )
    train, evaluation = grid[0]
    smoothed = False
    for member, line in members(run):
        xs, losses = member.series("train", x, "loss")
        smoothed = _averaged(train, xs, losses, line) or smoothed
        evaluation.plot(*member.series("eval", x, "loss"), marker="o", markersize=4, **line)
    if fused := run.eval_when("after_fusion"):
        evaluation.plot(
            [line[x] for line in fused],
            [line["loss"] for line in fused],
            linestyle="none",
            marker="D",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor=RUN,
            label="after fusion",
        )
    if paired:
        _difference(run, grid[1][0], "train", smoothed=True)
        _difference(run, grid[1][1], "eval", smoothed=False)
    for row in grid:
        for axes in row:
            _stage_lines(run, axes, x, named=axes in grid[0])
    style(train, ylabel="loss (nats per token)", title=f"Training loss{', moving average' if smoothed else ''}")
    style(evaluation, title="Evaluation loss")
    for axes in grid[-1]:
        style(axes, xlabel=XLABELS[x])
        if x == "tokens":
            count_axis(axes)
    for axes in grid[0]:
        _lift_stage_names(axes)
    legend(made, evaluation if evaluation.lines else train)
    return save(made, path)


def plot_learning_rate(run: RunData, path: Path) -> Path | None:
    """Learning rate and gradient norm against tokens; None if nothing was logged yet."""
    (rates,) = run.series("train", "learning_rate")
    tokens, norms = run.series("train", "tokens", "grad_norm")
    if not rates.size:
        return None
    title = f"Learning rate: {rates.max():.1e} at most, as logged"
    if norms.size and np.isfinite(norms).any():
        title += f"; gradient norm {np.nanmedian(norms):.2g} in the median, {np.nanmax(norms):.2g} at most"
        title += f" (at {figures.count(tokens[int(np.nanargmax(norms))])} tokens)"
    made = figure(title, height=4.6)
    top, bottom = made.subplots(2, 1, sharex=True)
    for member, line in members(run):
        top.plot(*member.series("train", "tokens", "learning_rate"), **line)
        bottom.plot(*member.series("train", "tokens", "grad_norm"), **{**line, "linewidth": line["linewidth"] / 2})
    style(top, ylabel="learning rate")
    top.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    style(bottom, xlabel=XLABELS["tokens"], ylabel="gradient norm,\nbefore clipping")
    if norms.size and norms.min() > 0 and norms.max() > 20 * norms.min():
        log_axis(bottom.yaxis)
    count_axis(bottom)
    for axes in (top, bottom):
        _stage_lines(run, axes, "tokens", named=axes is top)
    _lift_stage_names(top)
    legend(made, top)
    return save(made, path)


def members(run: RunData) -> list[tuple[RunData, dict[str, Any]]]:
    """(data, how its lines are drawn) of the control, where there is one, and of the run."""
    of: dict[str, tuple[RunData, str]] = {"control": (run.control, CONTROL)} if run.control else {}
    of[figures.method_name(run.method)] = (run, RUN)
    look = lines({name: colour for name, (_, colour) in of.items()})
    return [(member, look[name]) for name, (member, _) in of.items()]


def _averaged(axes: Axes, xs: Any, values: np.ndarray, line: dict[str, Any]) -> bool:
    """Draw `values` [n] faintly, and their moving average as `line` says; of few values themselves. Returns whether it
    was averaged."""
    span = _span(values)
    if span > 1:
        axes.plot(xs, values, color=line["color"], alpha=0.22, linewidth=0.8)
    marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(values) == 1 else {}
    axes.plot(xs, smooth(values, span), **marker, **line)
    return span > 1


def _note(run: RunData) -> str:
    if run.control is None:
        return ""
    return "Same tokens, order, schedule and seed. One seed each: not evidence of a difference."


def _time_title(run: RunData) -> str:
    own, whole = run.outcome.get("seconds"), run.outcome.get("total_seconds")
    if figures.is_number(whole):  # a shrink, which prunes too
        return f"{figures.method_name(run.method)}: training took {figures.duration(own)} of {figures.duration(whole)}"
    text = f"{figures.method_name(run.method)} took {figures.duration(own)}"
    if run.control is None:
        return f"{text} for {figures.count(run.outcome.get('tokens'))} tokens"
    other = run.control.outcome.get("seconds")
    text += f", control {figures.duration(other)}"
    return text + (f": {figures.ratio(own, other)} the time" if figures.ratio(own, other) else "")


def _difference(run: RunData, axes: Axes, event: str, *, smoothed: bool) -> None:
    """Run minus control, over the steps that both logged; of several evaluations at one step, the last."""
    assert run.control is not None
    own, other = (
        {line["step"]: line for line in member.metrics if line.get("event") == event} for member in (run, run.control)
    )
    shared = [step for step in own if step in other]
    xs = [own[step]["tokens"] for step in shared]
    gaps = np.array([own[step]["loss"] - other[step]["loss"] for step in shared], dtype=np.float64)
    axes.axhline(0, color=BEFORE, linewidth=1)
    line: dict[str, Any] = {"color": RUN, "linewidth": 1.7}
    if smoothed:
        _averaged(axes, xs, gaps, line)
    else:
        axes.plot(xs, gaps, marker="o", markersize=4, **line)
    below = f"{figures.method_name(run.method)} minus control (below 0: the control is worse)"
    style(axes, ylabel="difference (nats)" if event == "train" else "", title=below)
    axes.title.set_fontsize(9)


def _stage_lines(run: RunData, axes: Axes, x: str, *, named: bool) -> None:
    """A dotted vertical line where each stage after the first begins, with its name above the plot."""
    starts: dict[int, float] = {}
    for line in run.metrics:
        if line.get("stage") is not None and x in line:
            starts.setdefault(int(line["stage"]), line[x])
    for stage, start in sorted(starts.items()):
        if stage == 0:
            continue
        axes.axvline(start, color=BEFORE, linewidth=1, linestyle=":")
        if named:
            axes.text(
                start,
                1.0,
                f"stage {stage + 1}",
                transform=axes.get_xaxis_transform(),
                fontsize=8,
                color=BEFORE,
                va="bottom",
            )


def _lift_stage_names(axes: Axes) -> None:
    """Keep the panel's title clear of the stages' names."""
    axes.set_title(axes.get_title(loc="left"), loc="left", color="#22262b", fontsize=10.5, pad=16)
