"""report.html of a shrink: its sizes and losses over the phases, its curves, and what each layer has left."""

import dataclasses
import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.files import read_json, write_text
from graftlm.pruning.shrink.config import Shrink, default_values, load_shrink
from graftlm.pruning.shrink.folders import PhaseFolder
from graftlm.pruning.shrink.phases import Phase
from graftlm.pruning.shrink.story import rows, summarise
from graftlm.reporting import figures, nextsteps
from graftlm.reporting.curves import plot_learning_rate, plot_loss
from graftlm.reporting.layers import plot_iterations
from graftlm.reporting.page import Plot, as_yaml, differences, flatten, picture, template
from graftlm.reporting.phases import plot_phases
from graftlm.reporting.pruning import draw_layers, shape_rows
from graftlm.reporting.rundata import RunData, read_run

PLAN = "phases.json"
"""What a folder of a shrink is known by."""
ALT = {
    "phases": "Parameters, and held-out loss before pruning, after it and after training, by phase",
    "loss_tokens": "Training and evaluation loss against tokens",
    "loss_seconds": "Training and evaluation loss against seconds",
    "learning_rate": "Learning rate and gradient norm against tokens",
    "layers": "Parameters of attention and FFN in every layer, against the original's",
    "iterations": "Importance and what is left of every layer, and the model's size, by phase",
}


def write_report(folder: str | Path) -> Path:
    """Draw `folder`/plots and write `folder`/report.html for the shrink in `folder`, finished or not.

    Needs no weights. Raises UserError for a folder of anything else, and where no phase has ended yet.
    """
    folder = Path(folder)
    if not (folder / PLAN).is_file():
        raise UserError(f"{folder}: no {PLAN}; name a folder that graftlm shrink wrote (output_dir)")
    task, plan = load_shrink(folder / "config.yaml"), read_json(folder / PLAN)
    folders = [PhaseFolder(folder, Phase(**phase)) for phase in plan["phases"]]
    done = [one for one in folders if one.summary.is_file()]
    if not done:
        raise UserError(f"{folder}: none of its {len(folders)} phases has ended, so there is nothing to report yet")
    summary = summarise(task, plan, done)
    run = _as_one_run(read_run(folder), task, summary)
    path = folder / "report.html"
    plots = _draw(run, summary, done[-1].pruned, folder / "plots")
    context = _context(folder, task, summary, run, plots)
    finished = (folder / "summary.json").is_file()
    write_text(path, template("shrink.html").render({**context, "finished": finished, "planned": len(folders)}))
    return path


def _as_one_run(run: RunData, task: Shrink, summary: Mapping[str, Any]) -> RunData:
    """All phases as the curves of training know a run: the losses that pruning leaves are evaluations like others."""
    lines: list[dict[str, Any]] = []
    for line in run.metrics:
        one = {key: value for key, value in line.items() if key != "stage"}  # which begin anew in every phase
        if line["event"] == "prune":
            one |= {"event": "eval", "when": "pruned", "loss": line["loss_after"]}
            if line["phase"] == 1:
                lines.append({**one, "loss": line["loss_before"]})
        lines.append(one)
    recovery = figures.method_name("apex" if task.settings.recovery == "apex" else "full")
    return dataclasses.replace(run, metrics=tuple(lines), summary={**summary, "method": f"shrinking, {recovery}"})


def _draw(run: RunData, summary: dict[str, Any], pruned: Path, folder: Path) -> dict[str, Plot]:
    phases, original = summary["phases"], summary["original_shapes"]
    steps = [{**phase, "layer_importance": (phase["layer_importance"] or [None])[-1]} for phase in phases]
    made = (
        plot_phases(summary, folder / "phases.png"),
        plot_loss(run, "tokens", folder / "loss_tokens.png"),
        plot_loss(run, "seconds", folder / "loss_seconds.png"),
        plot_learning_rate(run, folder / "learning_rate.png"),
        draw_layers(pruned, summary["shapes"], original, summary["original_layer_parameters"], folder),
        plot_iterations(steps, original, summary["original_parameters"], folder / "iterations.png", unit="phase"),
    )
    return {path.stem: picture(path, ALT[path.stem]) for path in made if path is not None}


def _context(
    folder: Path, task: Shrink, summary: dict[str, Any], run: RunData, plots: dict[str, Plot]
) -> dict[str, Any]:
    values = task.to_dict()
    known = {key: values[key] for key in ("model", "data", "target_parameters", "sparsity", "max_steps", "tokens")}
    given = {key: value for key, value in values.items() if key not in known or known[key] is not None}
    before, after = figures.count(summary["original_parameters"]), figures.count(summary["parameters"])
    model = folder / "model"
    return {
        "folder": str(folder),
        "title": f"{Path(summary['model']).name}: {before} → {after} parameters",
        "intro": _intro(summary),
        "written": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "done": len(summary["phases"]),
        "go_on": f"graftlm shrink {shlex.quote(str(folder / 'config.yaml'))}",
        "cards": _cards(summary),
        "notes": summary["notes"],
        "plots": plots,
        "rows": rows(summary),
        "layers": shape_rows(summary["shapes"], summary["original_shapes"]),
        "differences": differences(given, default_values(task.run.max_steps)),
        "config": as_yaml(values),
        "environment": flatten(run.environment),
        "reproduce": nextsteps.reproduce(folder, "shrink"),
        "load": nextsteps.load_snippet_of(model),
        "commands": nextsteps.commands(folder),
    }


def _intro(summary: dict[str, Any]) -> str:
    phases = len(summary["phases"])
    trained = "APEX" if summary["recovery"] == "apex" else "plain training"
    text = f"{phases} phase{'' if phases == 1 else 's'} of pruning ({figures.PRUNING_NAMES[summary['method']]}) and "
    text += f"{trained}, sizes {summary['schedule']}, tokens {summary['shares']}"
    if (told := summary["distillation"]) is not None:
        text += f", learning from {told['teacher']} too"
    return text + "."


def _cards(summary: dict[str, Any]) -> list[dict[str, str]]:
    before, after, end = (summary[key] for key in ("original_parameters", "parameters", "eval_loss_end"))
    asked = f"at most {summary['target_parameters']:,} were asked for"
    return [
        {
            "label": "parameters",
            "value": f"{after:,}",
            "under": f"{figures.share(1 - after / before)} fewer than {figures.count(before)}; {asked}",
        },
        {
            "label": "evaluation loss",
            "value": figures.loss(end),
            "under": f"from {figures.loss(summary['eval_loss_start'])}; perplexity {figures.perplexity(end)}",
        },
        {
            "label": "time",
            "value": figures.duration(summary["total_seconds"]),
            "under": f"{figures.duration(summary['prune_seconds'])} of pruning, opening, measuring and saving",
        },
        {
            "label": "tokens",
            "value": figures.count(summary["tokens"]),
            "under": f"{figures.integer(sum(phase['steps'] for phase in summary['phases']))} optimizer steps",
        },
    ]
