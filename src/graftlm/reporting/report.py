"""RUN/report.html: one file that tells what a run did, with its plots inside."""

import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from graftlm.configuring import config_to_dict
from graftlm.files import write_text
from graftlm.reporting import figures, nextsteps
from graftlm.reporting.page import as_yaml, differences, flatten, picture, template
from graftlm.reporting.plots import draw
from graftlm.reporting.rundata import RunData, read_run
from graftlm.training.config import RunConfig, SourceConfig

ALT = {
    "loss_tokens": "Training and evaluation loss against tokens",
    "loss_seconds": "Training and evaluation loss against seconds",
    "learning_rate": "Learning rate and gradient norm against tokens",
    "activations_heads": "Sorted activations of attention heads, one line per layer",
    "activations_channels": "Sorted activations of FFN channels, one line per layer",
    "sigma": "Spread of activations per layer: sigma, and sigma divided by the mean",
    "stages": "Components chosen in each stage, and the share kept from the stage before",
}


def make_report(run: Path) -> Path:
    """Draw a run's plots and write RUN/report.html, which needs no network and no other file.

    A run that is still going, has no control, or is plain training gets the sections it has. Raises UserError for a
    folder that is missing or broken.
    """
    data = read_run(run)
    path = data.folder / "report.html"
    write_text(path, template("report.html").render(_context(data)))
    return path


def config_differences(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, value, default) of every key that differs from its default, those of apex:, lora: ... included, in the
    config's order."""
    defaults = config_to_dict(RunConfig(model="", data=(SourceConfig(""),)))
    return differences(config, {key: value for key, value in defaults.items() if key not in ("model", "data")})


def _context(data: RunData) -> dict[str, Any]:
    """Everything the template shows, already formatted."""
    outcome = data.outcome
    control = data.control.outcome if data.control is not None else None
    rows = figures.comparison(outcome, control)
    plots = {path.stem: picture(path, ALT[path.stem]) for path in draw(data)}
    gap = outcome.get("fused_max_abs_logit_difference")
    return {
        "run": str(data.folder),
        "go_on": f"graftlm train {shlex.quote(str(data.folder / 'config.yaml'))} --resume",
        "title": data.folder.resolve().name,
        "model": outcome.get("model", figures.MISSING),
        "method": figures.method_name(data.method),
        "written": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "finished": data.finished,
        "control": control is not None,
        "control_finished": data.control is None or data.control.finished,
        "verdict": figures.verdict(outcome, control),
        "one_seed": figures.ONE_SEED,
        "cards": _cards(outcome, control),
        "results": [row for row in rows if not row.cost],
        "costs": [row for row in rows if row.cost],
        "estimates": _estimates(outcome),
        "plots": plots,
        "samples": data.activation_samples,
        "stages": [_stage(stage) for stage in data.stages],
        "data": _data(outcome.get("data") or {}),
        "expanded": data.method == "apex",
        "fusion": figures.scientific(gap) if figures.is_number(gap) else "",
        "notes": [str(note) for note in outcome.get("notes") or []],
        "differences": config_differences(data.config),
        "config": as_yaml(data.config) if data.config else "",
        "environment": flatten(data.environment),
        "reproduce": nextsteps.reproduce(data.folder),
        "load": nextsteps.load_snippet_of(data.folder / "model"),
        "commands": nextsteps.commands(data.folder),
        "paper": nextsteps.PAPER,
        "citation": nextsteps.CITATION,
    }


def _cards(outcome: dict[str, Any], control: dict[str, Any] | None) -> list[dict[str, str]]:
    """The few figures at the top: label, value, a line under it, and whose colour it has."""
    end, other = outcome.get("eval_loss_end"), (control or {}).get("eval_loss_end")
    cards = [
        {
            "label": f"evaluation loss, {figures.method_name(outcome.get('method'))}",
            "value": figures.loss(end),
            "under": f"from {figures.loss(outcome.get('eval_loss_start'))}; perplexity {figures.perplexity(end)}",
            "owner": "run",
        }
    ]
    if control is not None:
        cards += [
            {
                "label": "evaluation loss, control",
                "value": figures.loss(other),
                "under": f"from {figures.loss(control.get('eval_loss_start'))}; perplexity {figures.perplexity(other)}",
                "owner": "control",
            },
            {
                "label": "difference",
                "value": figures.difference(end, other) or figures.MISSING,
                "under": "run minus control; one seed each",
                "owner": "",
            },
            {
                "label": "time against control",
                "value": figures.ratio(outcome.get("seconds"), control.get("seconds")) or figures.MISSING,
                "under": f"{figures.duration(outcome.get('seconds'))} to {figures.duration(control.get('seconds'))}",
                "owner": "",
            },
        ]
    else:
        cards.append(
            {
                "label": "time",
                "value": figures.duration(outcome.get("seconds")),
                "under": f"{figures.rate(outcome.get('tokens_per_second'))} tokens per second",
                "owner": "",
            }
        )
    cards.append(
        {
            "label": "tokens",
            "value": figures.count(outcome.get("tokens")),
            "under": f"{figures.integer(outcome.get('steps'))} optimizer steps",
            "owner": "",
        }
    )
    return cards


def _estimates(outcome: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, estimated, real, real / estimated) where the run was planned beforehand."""
    plan = outcome.get("plan") or {}
    pairs = (
        ("time", "estimated_seconds", "seconds", figures.duration),
        ("peak memory", "estimated_peak_memory_bytes", "peak_memory_bytes", figures.size),
    )
    return [
        (label, show(plan[guess]), show(outcome.get(real)), figures.ratio(outcome.get(real), plan[guess]))
        for label, guess, real, show in pairs
        if figures.is_number(plan.get(guess))
    ]


def _stage(stage: dict[str, Any]) -> dict[str, str]:
    before, after = stage.get("eval_loss_before_fusion"), stage.get("eval_loss_after_fusion")
    effective, moved = stage.get("effective_k") or {}, (stage.get("moved") or {}).get("all") or {}
    return {
        "number": str(int(stage["stage"]) + 1),
        "step": figures.integer(stage["step"] + 1) if figures.is_number(stage.get("step")) else figures.MISSING,
        "steps": figures.integer(stage.get("steps")),
        "tokens": figures.count(stage.get("tokens")),
        "start": figures.loss(stage.get("eval_loss_start")),
        "before": figures.loss(before),
        "after": figures.loss(after),
        "change": "exactly 0" if before == after and before is not None else figures.difference(after, before),
        "moved": figures.scientific(moved.get("operator")),
        "own": figures.scientific(moved.get("own")),
        "multiplier": figures.number((stage.get("multiplier") or {}).get("median")),
        "heads": figures.share(effective.get("heads")),
        "channels": figures.share(effective.get("channels")),
    }


def _data(data: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (
        ("documents", "documents", figures.integer),
        ("tokens", "tokens", figures.count),
        ("blocks (sequences)", "blocks", figures.integer),
        ("tokens that count in the loss", "supervised_share", figures.share),
        ("truncated", "truncated_share", figures.share),
        ("share of the data trained on", "epochs", _epochs),
    )
    rows = [(label, show(data[key])) for label, key, show in pairs if data.get(key) is not None]
    if (sequences := data.get("evaluation_blocks")) is not None:
        tokens = figures.count(data.get("evaluation_tokens"))
        what = f"{figures.integer(sequences)} held-out sequences, {tokens} tokens" if sequences else "nothing"
        rows.append(("evaluation loss measured on", what))
    return rows


def _epochs(value: float) -> str:
    """A share, and what is more than all of it as times."""
    return figures.share(value) if value < 1 else f"{value:.2f} times all of it"
