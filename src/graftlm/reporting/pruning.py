"""report.html of a pruned model: what it has left, layer by layer, and how that came about."""

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.files import read_json, write_text
from graftlm.models import load_skeleton
from graftlm.parts import component_cost
from graftlm.pruning.saving import SUMMARY
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.surgery import prunable_blocks
from graftlm.reporting import figures, nextsteps
from graftlm.reporting.layers import Shape, plot_iterations, plot_layers
from graftlm.reporting.page import Plot, differences, flatten, inline, template

ALT = {
    "layers": "Parameters of attention and FFN in every layer, against the original's",
    "iterations": "Importance and what is left of every layer, and the model's size, by iteration",
}
KINDS = {"heads": "attention", "channels": "FFN"}
_DEFAULTS = {k: v for k, v in dataclasses.asdict(PruneSettings(sparsity=0.5)).items() if k != "sparsity"}


def write_report(folder: str | Path) -> Path:
    """Draw `folder`/plots and write `folder`/report.html for the pruned model in `folder`, from its pruning.json.

    Needs no weights. Raises UserError for a folder without pruning.json.
    """
    folder = Path(folder)
    if not (folder / SUMMARY).is_file():
        raise UserError(f"{folder}: no {SUMMARY}; name a folder that graftlm prune wrote")
    told = read_json(folder / SUMMARY)
    plots = [
        plot_layers(told["shapes"], told["original_shapes"], folder / "plots" / "layers.png", component_costs(folder)),
        plot_iterations(
            told["steps"], told["original_shapes"], told["original_parameters"], folder / "plots" / "iterations.png"
        ),
    ]
    drawn = {path.stem: Plot(ALT[path.stem], inline(path)) for path in plots if path is not None}
    path = folder / "report.html"
    write_text(path, template("pruning.html").render(_context(folder, told, drawn)))
    return path


def component_costs(folder: Path) -> dict[str, int] | None:
    """Parameters of a key-value group and of a channel of the model in `folder`, by reading its config only; None
    where a part has gone from every layer or the model cannot be laid out without its weights."""
    model = load_skeleton(str(folder))
    if model is None:
        return None
    costs = {KINDS[block.kind]: component_cost(model, block) for block in prunable_blocks(model)}
    return costs if len(costs) == len(KINDS) else None


def _context(folder: Path, told: dict[str, Any], plots: dict[str, Plot]) -> dict[str, Any]:
    before, after = told["original_parameters"], told["parameters"]
    method = figures.PRUNING_NAMES.get(told["method"], told["method"])
    return {
        "folder": str(folder),
        "title": f"{told['model'] or folder.name}: {figures.count(before)} → {figures.count(after)} parameters",
        "method": method,
        "model": told["model"] or "a model",
        "data": " of ".join(filter(None, (told.get("calibration"), told["data"]))),
        "written": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "cards": _cards(told),
        "plots": plots,
        "layers": shape_rows(told["shapes"], told["original_shapes"]),
        "notes": [str(note) for note in told["notes"]],
        "differences": differences(told["settings"], _DEFAULTS),
        "settings": list(told["settings"].items()),
        "environment": flatten(told["environment"]),
        "load": nextsteps.load_snippet(str(folder), trust="auto_map" in read_json(folder / "config.json")),
    }


def _cards(told: dict[str, Any]) -> list[dict[str, str]]:
    steps = len(told["steps"])
    each = sum(step["seconds"] for step in told["steps"]) / steps if steps else None
    samples, length = told["settings"]["samples"], told["settings"]["sample_length"]
    cards = [
        {
            "label": "parameters",
            "value": figures.count(told["parameters"]),
            "under": f"{figures.share(told['removed_share'])} fewer than {figures.count(told['original_parameters'])}",
        },
        {
            "label": "time to prune",
            "value": figures.duration(told["seconds"]),
            "under": f"{steps} iterations of {figures.duration(each)}, on {samples} × {length} tokens each",
        },
    ]
    if figures.is_number(told.get("held_out_loss_before")):
        value = told.get("held_out_loss")
        said = f"from {figures.loss(told['held_out_loss_before'])}; token perplexity {figures.perplexity(value)}"
        cards.insert(
            1,
            {
                "label": "loss on calibration text held back",
                "value": figures.loss(value),
                "under": f"{said}, {length} tokens",
            },
        )
    return cards


def shape_rows(shapes: Sequence[Shape], original: Sequence[Shape]) -> list[tuple[str, ...]]:
    """Rows of the table of shapes: layer, then query heads, key-value groups and channels, `now of before`."""
    before = original if len(original) == len(shapes) else None  # whole layers went: the others are numbered anew
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    rows = []
    for index, shape in enumerate(shapes):
        cells = [f"{shape[name]:,}" + (f" of {before[index][name]:,}" if before else "") for name in names]
        rows.append((str(index), *cells))
    return rows
