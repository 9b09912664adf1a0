"""A picture of pruning and training in turn: how large the model is, and what each phase costs and brings back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftlm.reporting import figures
from graftlm.reporting.style import BEFORE, CONTROL, RUN, figure, legend, lines, save, style, whole_numbers


def plot_phases(summary: Mapping[str, Any], path: Path) -> Path:
    """Parameters after each phase's pruning, and held-out loss before pruning, after it, and after training.
    `summary`: as pruning.shrink.story.summarise makes it."""
    phases = summary["phases"]
    numbers = [phase["phase"] for phase in phases]
    worst = max(phases, key=_cost)
    title = f"{figures.count(summary['original_parameters'])} → {figures.count(summary['parameters'])} parameters"
    if _cost(worst) > 0:
        title += f"; pruning costs most in phase {worst['phase']}: {_cost(worst):+.4f} nats"
    made = figure(title, width=10.0, height=4.4)
    left, right = made.subplots(1, 2)
    sizes = [summary["original_parameters"], *(phase["parameters"] for phase in phases)]
    left.plot([0, *numbers], sizes, color=RUN, marker="o", markersize=4, linewidth=1.8)
    left.yaxis.set_major_formatter(lambda value, _: figures.count(value))
    style(left, xlabel="phase (0: the original)", ylabel="parameters", title="size")
    moments = (
        ("before_pruning", "before pruning", BEFORE, "o"),
        ("after_pruning", "after pruning", CONTROL, "v"),
        ("end", "after training", RUN, "s"),
    )
    look = lines({label: colour for _, label, colour, _ in moments})
    for key, label, _, marker in moments:
        there = [(p["phase"], value) for p in phases if figures.is_number(value := p[f"eval_loss_{key}"])]
        right.plot([x for x, _ in there], [y for _, y in there], marker=marker, markersize=5, **look[label])
    style(right, xlabel="phase", ylabel="loss (nats per token)", title="evaluation loss")
    for axes in (left, right):
        whole_numbers(axes.xaxis)
    legend(made, right)
    return save(made, path)


def _cost(phase: Mapping[str, Any]) -> float:
    """Nats that a phase's pruning adds to the held-out loss; 0 where it was not measured."""
    before, after = phase["eval_loss_before_pruning"], phase["eval_loss_after_pruning"]
    return float(after - before) if figures.is_number(before) and figures.is_number(after) else 0.0
