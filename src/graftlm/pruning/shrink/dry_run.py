"""`graftlm shrink --dry-run`: the phases, and what they would take, without pruning or training.

Time and memory are those that training/estimates.py gives for a run on the original model, the widest of all; a later
phase's step takes as much less time as its model has fewer parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graftlm.pruning.base import TOKENS_A_PASS
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.shrink.config import Shrink
from graftlm.pruning.shrink.phase_pruning import prune_settings
from graftlm.pruning.shrink.phases import Phase
from graftlm.pruning.shrink.run import plan_phases
from graftlm.pruning.ways import iterations_of, sequences_seen
from graftlm.reporting import figures
from graftlm.reporting.table import wide
from graftlm.training.arguments import check_settings
from graftlm.training.estimates import estimate
from graftlm.training.plan import model_for_shapes


def dry_run(task: Shrink, *, console: Console | None = None) -> dict[str, Any]:
    """Print the phases with sizes, steps, tokens and time, and the memory of all; returns them.

    Of the JSON values: `phases` (each with number, parameters, first, end, tokens, calibration_tokens,
    seconds, prune_seconds),
    original_parameters, target_parameters, steps, tokens, seconds (None where they are not known), peak_memory_bytes.
    Raises UserError for what a shrink would refuse.
    """
    console = console or Console()
    check_settings(task.run)
    planned = plan_phases(task)
    run = estimate(task.run, model_for_shapes(task.run), None)
    phases = [_phase(task, Phase(**phase), planned, run) for phase in planned["phases"]]
    times = [phase[key] for phase in phases for key in ("seconds", "prune_seconds")]
    told = {
        "original_parameters": planned["original_parameters"],
        "target_parameters": planned["target_parameters"],
        "phases": phases,
        "steps": task.run.max_steps,
        "tokens": task.run.max_steps * run["tokens_per_step"],
        "seconds": None if None in times else sum(times),
        "peak_memory_bytes": run["estimated_peak_memory_bytes"],
        "estimate": run,
    }
    _print(task, told, console)
    return told


def _phase(task: Shrink, phase: Phase, planned: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    before = planned["phases"][phase.number - 2]["parameters"] if phase.number > 1 else planned["original_parameters"]
    step, tokens = run["estimated_step_seconds"], run["tokens_per_step"]
    pruning = prune_settings(task, phase, len(planned["phases"]))
    prunes = before > phase.parameters
    seen = _tokens_seen(pruning, planned["original_shapes"]) if prunes else 0
    whole = planned["original_parameters"]
    return {
        "number": phase.number,
        "parameters": phase.parameters,
        "removed_share": 1 - phase.parameters / before,
        "first": phase.first,
        "end": phase.end,
        "tokens": phase.steps * tokens,
        "calibration_tokens": sequences_seen(pruning) * pruning.sample_length if prunes else 0,
        "seconds": None if step is None else phase.steps * step * phase.parameters / whole,
        "prune_seconds": None if step is None else seen / tokens * step * before / whole,
    }


def _tokens_seen(pruning: PruneSettings, shapes: Sequence[Mapping[str, Any]]) -> float:
    """Tokens of training that take as long as a phase's pruning."""
    seen: float = sequences_seen(pruning) * pruning.sample_length
    if pruning.heads_by == "loss":  # forward passes, a third of a step of training, on a pass's tokens
        groups = sum(shape["num_key_value_heads"] for shape in shapes)
        assert pruning.samples is not None  # of a default or a preset
        tokens = pruning.samples * pruning.sample_length
        seen += iterations_of(pruning) * groups * min(tokens, max(TOKENS_A_PASS, pruning.sample_length)) / 3
    return seen


def _print(task: Shrink, told: dict[str, Any], console: Console) -> None:
    settings = task.settings
    table = Table(header_style="bold", title=f"{settings.model}: {len(told['phases'])} phases, {settings.schedule}")
    for name in ("phase", "parameters", "fewer", "steps", "tokens", "calibration", "pruning", "training"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_row("original", figures.integer(told["original_parameters"]))
    for phase in told["phases"]:
        table.add_row(
            str(phase["number"]),
            figures.integer(phase["parameters"]),
            f"{phase['removed_share']:.2%}",
            f"{phase['first'] + 1:,} to {phase['end']:,}",
            figures.count(phase["tokens"]),
            figures.count(phase["calibration_tokens"]),
            figures.duration(phase["prune_seconds"]),
            figures.duration(phase["seconds"]),
        )
    wide(console).print(table)
    left = told["target_parameters"] / told["original_parameters"]
    console.print(
        f"{left:.1%} of the parameters stay; {figures.integer(told['steps'])} steps, {figures.count(told['tokens'])} "
        f"tokens, {figures.duration(told['seconds'])} without evaluations and saving; peak memory "
        f"{figures.size(told['peak_memory_bytes'])}",
        highlight=False,
    )
    rest = [
        "sizes: at most these; a phase ends as close below as its components allow",
        "time: a step of the original model, measured on a part of it, scaled by parameters; pruning as if its "
        "calibration sequences were trained on",
        "memory: of training the first phase as if nothing were pruned",
        *(f"note: {note}" for note in told["estimate"]["notes"]),
    ]
    for line in rest:
        console.print(Text(line, style="dim"))
