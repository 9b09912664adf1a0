"""The figures of a comparison: loss against tokens and seconds, plain training's curve, differences by seed."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from graftlm.comparing.tables import interval, signed
from graftlm.reporting.curves import XLABELS
from graftlm.reporting.style import BEFORE, INK, colours, count_axis, figure, legend, lines, save, style

FEWEST_POINTS = 3
"""Of all arms, from which on a line between them tells how the loss went."""


def draw(summary: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what there is to see of comparison.json into `folder`; returns the files."""
    made = [
        _curves(summary, "tokens", folder / "loss_tokens.png"),
        _curves(summary, "seconds", folder / "loss_seconds.png"),
        *(_needed(summary, control, folder / f"tokens_needed_{i}.png") for i, control in enumerate(summary["plain"])),
        _differences(summary, folder / "differences.png"),
    ]
    return [path for path in made if path is not None]


def _curves(summary: dict[str, Any], x: Literal["tokens", "seconds"], path: Path) -> Path | None:
    """Loss on the way, where all arms were evaluated. With hardly a point between the start and the end there is no way
    to draw: nothing against tokens, of which all have as many, and against seconds where each arm ends."""
    arms = [arm for arm in summary["arms"] if arm["curve"]]
    if not arms:
        return None
    # Stages have evaluations of their own; a line to its next point says nothing of what lies between.
    shared = set.intersection(*({round(tokens) for tokens in arm["curve"]["tokens"]} for arm in arms))
    ends = len(shared) < FEWEST_POINTS
    if ends and x == "tokens":
        return None
    note = "Means over seeds, at each arm's chosen learning rate."
    if ends:
        note += " Nothing between start and end was measured of all arms."
    elif any(len(arm["curve"]["tokens"]) > len(shared) for arm in arms):
        note += " Only where all arms were evaluated."
    made = figure(
        "Held-out loss at the end against the time it took" if ends else f"Held-out loss against {x}", note=note
    )
    axes, look = made.subplots(), lines(_colours(summary))
    for arm in arms:
        curve, line = arm["curve"], look[arm["name"]]
        if ends:
            axes.plot(curve[x][-1:], curve["loss"][-1:], "o", markersize=7, color=line["color"], label=arm["name"])
        else:
            at = [i for i, tokens in enumerate(curve["tokens"]) if round(tokens) in shared]
            xs, losses = ([curve[key][i] for i in at] for key in (x, "loss"))
            axes.plot(xs, losses, marker="o", markersize=3.5, **line)
    style(axes, xlabel=XLABELS[x], ylabel="loss (nats per token)")
    if x == "tokens":
        count_axis(axes)
    legend(made, axes)
    return save(made, path)


def _needed(summary: dict[str, Any], control: str, path: Path) -> Path | None:
    """Plain training's loss at the end of whole schedules of several lengths, and where the arms' losses meet it."""
    curve = summary["plain"][control]
    arms = [arm for arm in summary["arms"] if arm["matched"] == control and arm["loss"] and arm.get("needed")]
    losses = np.array(list(curve["losses"].values()))  # [seeds, lengths]
    made = figure(
        f"Tokens that plain training ({control}) needs to reach the same loss",
        note="Every point of plain training is a run with its whole schedule at that length.",
    )
    axes = made.subplots()
    colour = _colours(summary)
    look = lines({name: colour[name] for name in (control, *(arm["name"] for arm in arms))})
    for one in losses:
        axes.plot(curve["multiples"], one, color=colour[control], alpha=0.3, linewidth=0.9)
    axes.plot(curve["multiples"], losses.mean(axis=0), marker="o", **look[control])
    for arm in arms:
        name = arm["name"]
        # Over the seeds that the curve has, as the figure in the legend.
        loss = np.mean([one for seed, one in arm["loss"]["by_seed"].items() if seed in curve["losses"]])
        axes.axhline(float(loss), **{**look[name], "label": f"{name}: {arm['needed']['text']} ×"})
    axes.set_xscale("log")
    axes.set_xticks(curve["multiples"], [f"{multiple:g}" for multiple in curve["multiples"]])
    axes.minorticks_off()
    style(axes, xlabel="multiple of the tokens (log)", ylabel="loss (nats per token)")
    legend(made, axes)
    return save(made, path)


def _differences(summary: dict[str, Any], path: Path) -> Path | None:
    """Each arm minus its control: a dot a seed, the mean, and the t interval."""
    arms = [arm for arm in summary["arms"] if arm.get("difference")]
    if not arms:
        return None
    made = figure(
        "Held-out loss minus the control's, by seed",
        height=1.9 + 0.5 * len(arms),
        note="Dots are seeds, bars 95% t intervals; left of 0 the arm is better.",
    )
    axes: Axes = made.subplots()
    axes.axvline(0, color=BEFORE, linewidth=1)
    for height, arm in enumerate(reversed(arms)):
        gap, colour = arm["difference"], _colours(summary)[arm["name"]]
        if gap["t_interval"]:
            axes.plot(gap["t_interval"], [height, height], color=colour, linewidth=2)
        axes.plot(list(gap["by_seed"].values()), [height] * gap["n"], "o", color=colour, markersize=4, alpha=0.6)
        axes.plot([gap["mean"]], [height], "D", color=colour, markersize=7)
        axes.annotate(
            f"{signed(gap['mean'])} ({interval(gap['t_interval'])})" if gap["t_interval"] else signed(gap["mean"]),
            (gap["mean"], height), xytext=(0, 8), textcoords="offset points", fontsize=8.5, color=INK, ha="center",
        )  # fmt: skip
    axes.set_yticks(range(len(arms)), [arm["name"] for arm in reversed(arms)])
    axes.set_ylim(-0.6, len(arms) - 0.3)
    style(axes, xlabel="difference (nats per token)")
    return save(made, path)


def _colours(summary: dict[str, Any]) -> dict[str, str]:
    """One colour an arm, the same in every figure."""
    return colours([arm["name"] for arm in summary["arms"]])


def alt(path: Path) -> str:
    """What a figure shows, for who cannot see it."""
    return {
        "loss_tokens": "Held-out loss of each arm against tokens",
        "loss_seconds": "Held-out loss of each arm against seconds",
        "differences": "Difference of each arm to its control, by seed, with intervals",
    }.get(path.stem, "Plain training's final loss against multiples of the tokens, with the arms' losses as lines")
