"""What a shrink tells when it is done: metrics of all phases in one file, a summary, and a table.

summary.json:
    kind                 "shrink"
    model, method, recovery, schedule, shares, interleaves, keep_moments, distillation   as resolved; method: of pruning
    original_parameters, target_parameters, parameters   of the model before, as asked, and after
    original_shapes, shapes   of every layer: num_attention_heads, num_key_value_heads, intermediate_size
    original_layer_parameters   of every layer
    steps, tokens        of all phases
    seconds              of training, without evaluation and saving; prune_seconds: of everything else a phase does
                         before it trains; total_seconds: both
    peak_memory_bytes    the largest of the phases'
    eval_loss_start      held-out loss of the original; eval_loss_end: of what comes out; null without held-out data
    phases               a list, one object a phase:
        phase, target_parameters, parameters_before, parameters, removed_share (of parameters_before)
        first_step, steps, tokens, learning_rate (at its end)
        prune_seconds, seconds (of training), calibration_tokens (that pruning looked at)
        eval_loss_before_pruning, eval_loss_after_pruning, eval_loss_end
        shapes           of every layer after pruning
        layer_importance a list by pruning iteration, of every layer's importance, or null
    notes                what a user should know

metrics.jsonl: the lines of the phases' own (training/metrics.py), each with `phase`; steps, tokens and seconds count on
from phase to phase. Before each phase's, a line `event: prune` with `phase`, `step`, `tokens`, `seconds`, `parameters`,
`loss_before` and `loss_after`.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from graftlm.files import read_json, write_text
from graftlm.pruning.shrink.config import Shrink
from graftlm.pruning.shrink.folders import PhaseFolder
from graftlm.pruning.ways import has_control
from graftlm.reporting import figures
from graftlm.reporting.table import wide


def write_metrics(folder: Path, folders: Sequence[PhaseFolder]) -> None:
    """metrics.jsonl of the phases that are finished."""
    lines: list[dict[str, Any]] = []
    tokens, seconds = 0, 0.0
    for here in folders:
        facts, told = read_json(here.facts), read_json(here.summary)
        lines.append(
            {
                "event": "prune",
                "phase": here.phase.number,
                "step": here.phase.first,
                "tokens": tokens,
                "seconds": seconds,
                "parameters": facts["parameters"],
                "loss_before": facts["eval_loss_before_pruning"],
                "loss_after": facts["eval_loss_after_pruning"],
            }
        )
        lines += [{**line, "phase": here.phase.number} for line in _lines(here.train / "metrics.jsonl")]
        tokens, seconds = told["tokens"], told["seconds"]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summarise(task: Shrink, plan: dict[str, Any], folders: Sequence[PhaseFolder]) -> dict[str, Any]:
    """summary.json of a shrink whose phases are all finished; `plan`: phases.json."""
    phases: list[dict[str, Any]] = []
    notes: dict[str, list[int]] = {}  # with the phases that had it
    tokens, seconds, peak = 0, 0.0, 0
    for here in folders:
        facts, told = read_json(here.facts), read_json(here.summary)
        rates = [line for line in _lines(here.train / "metrics.jsonl") if line["event"] == "train"]
        phases.append(
            {
                "phase": here.phase.number,
                "target_parameters": here.phase.parameters,
                "parameters_before": facts["parameters_before"],
                "parameters": facts["parameters"],
                "removed_share": 1 - facts["parameters"] / facts["parameters_before"],
                "first_step": here.phase.first,
                "steps": here.phase.steps,
                "tokens": told["tokens"] - tokens,
                "learning_rate": rates[-1]["learning_rate"] if rates else None,
                "prune_seconds": facts["seconds"],
                "calibration_tokens": facts.get("calibration_tokens"),
                "seconds": round(told["seconds"] - seconds, 3),
                "eval_loss_before_pruning": facts["eval_loss_before_pruning"],
                "eval_loss_after_pruning": facts["eval_loss_after_pruning"],
                "eval_loss_end": told["eval_loss_end"],
                "shapes": facts["shapes"],
                "layer_importance": facts["layer_importance"],
            }
        )
        for note in dict.fromkeys([*facts["notes"], *told["notes"]]):
            notes.setdefault(note, []).append(here.phase.number)
        tokens, seconds, peak = told["tokens"], told["seconds"], max(peak, told["peak_memory_bytes"] or 0)
    pruning = round(sum(phase["prune_seconds"] for phase in phases), 3)
    settings = task.settings
    return {
        "kind": "shrink",
        "model": settings.model,
        "method": task.prune.method,
        "recovery": settings.recovery,
        "schedule": settings.schedule,
        "shares": settings.shares,
        "interleaves": len(phases),
        "keep_moments": settings.keep_moments,
        "distillation": task.to_dict()["distillation"] if settings.distillation.teacher else None,
        "original_parameters": plan["original_parameters"],
        "target_parameters": plan["target_parameters"],
        "parameters": phases[-1]["parameters"],
        "original_shapes": plan["original_shapes"],
        "original_layer_parameters": plan.get("original_layer_parameters"),
        "shapes": phases[-1]["shapes"],
        "steps": task.run.max_steps,
        "tokens": tokens,
        "seconds": seconds,
        "prune_seconds": pruning,
        "total_seconds": round(seconds + pruning, 3),
        "peak_memory_bytes": peak,
        "eval_loss_start": phases[0]["eval_loss_before_pruning"],
        "eval_loss_end": phases[-1]["eval_loss_end"],
        "phases": phases,
        "notes": [_note(note, where, len(phases)) for note, where in notes.items()],
    }


def _note(note: str, where: Sequence[int], phases: int) -> str:
    if len(where) == phases:
        return note
    return f"phase{'' if len(where) == 1 else 's'} {', '.join(map(str, where))}: {note}"


def rows(summary: dict[str, Any]) -> list[list[str]]:
    """The table of phases, its header first: losses before pruning, after it and after training; tokens of calibration
    that pruning looked at; seconds of pruning and of training."""
    table = [["phase", "parameters", "fewer", "steps", "tokens", "loss", "pruned", "trained", "calibration", "seconds"]]
    for phase in summary["phases"]:
        losses = [phase[f"eval_loss_{when}"] for when in ("before_pruning", "after_pruning", "end")]
        table.append(
            [
                str(phase["phase"]),
                figures.integer(phase["parameters"]),
                f"{phase['removed_share']:.1%}",
                figures.integer(phase["steps"]),
                figures.count(phase["tokens"]),
                *map(figures.loss, losses),
                figures.count(phase["calibration_tokens"]),
                f"{phase['prune_seconds']:,.0f} + {phase['seconds']:,.0f}",
            ]
        )
    return table


def print_summary(task: Shrink, summary: dict[str, Any], *, console: Console | None = None) -> None:
    """Print the phases, and where the model lies."""
    console, folder = console or Console(), task.folder
    header, *body = rows(summary)
    table = Table(header_style="bold", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in header:
        table.add_column(name, justify="right", overflow="fold")
    for row in body:
        table.add_row(*row)
    wide(console).print(table)
    before, after = summary["original_parameters"], summary["parameters"]
    console.print(
        f"{before:,} -> {after:,} parameters ({1 - after / before:.1%} fewer), held-out loss "
        f"{figures.loss(summary['eval_loss_start'])} -> {figures.loss(summary['eval_loss_end'])}, "
        f"{summary['tokens']:,} tokens in {figures.duration(summary['total_seconds'])}",
        highlight=False,
    )
    for note in summary["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(f"model: {folder / 'model'}", soft_wrap=True, highlight=False)
    if any(shape != summary["shapes"][0] for shape in summary["shapes"]) and has_control(task.prune):
        words = ["graftlm", "shrink", str(folder / "config.yaml"), "prune.uniform=true", f"output_dir={folder}-uniform"]
        command = f"compare it with its uniform control: {shlex.join(words)}"
        console.print(command, soft_wrap=True, highlight=False, markup=False)
