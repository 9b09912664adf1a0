"""report.html of a pruned model: what it has left, layer by layer, and how that came about."""

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from graftlm.anatomy import is_per_layer
from graftlm.errors import UserError
from graftlm.files import read_json, write_text
from graftlm.models import has_own_class, load_skeleton
from graftlm.parts import component_cost, layer_parameters
from graftlm.pruning.saving import SUMMARY
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.surgery import prunable_blocks
from graftlm.pruning.ways import WAYS
from graftlm.reporting import figures, nextsteps
from graftlm.reporting.layers import Shape, plot_iterations, plot_layers, plot_whole_layers
from graftlm.reporting.page import Plot, differences, flatten, flow, picture, template

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
        draw_layers(
            folder, told["shapes"], told["original_shapes"], told.get("original_layer_parameters"), folder / "plots"
        ),
        plot_iterations(
            told["steps"], told["original_shapes"], told["original_parameters"], folder / "plots" / "iterations.png"
        ),
    ]
    drawn = {path.stem: picture(path, ALT[path.stem]) for path in plots if path is not None}
    path = folder / "report.html"
    write_text(path, template("pruning.html").render(_context(folder, told, drawn)))
    return path


def draw_layers(
    folder: Path,
    shapes: Sequence[Shape],
    original: Sequence[Shape],
    layers_before: Sequence[int] | None,
    plots: Path,
) -> Path:
    """`plots`/layers.png of the model in `folder`, by reading its config only: of attention and FFN apart, or of whole
    layers where the components have all stayed and every one is smaller (a sliced hidden size).

    layers_before: parameters of the original's layers; None: not known.
    """
    path, model = plots / "layers.png", load_skeleton(str(folder))
    if model is None:
        return plot_layers(shapes, original, path)
    if has_own_class(model) and not is_per_layer(model.config) and layers_before is not None:
        return plot_whole_layers(layer_parameters(model), layers_before, path)
    return plot_layers(shapes, original, path, component_costs(model))


def component_costs(model: PreTrainedModel) -> dict[str, int] | None:
    """Parameters of a key-value group and of a channel; None where a part has gone from every layer."""
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
        "data": _calibrated_on(told),
        "written": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "cards": _cards(told),
        "plots": plots,
        "layers": shape_rows(
            told["shapes"],
            told["original_shapes"],
            told.get("layer_parameters"),
            told.get("original_layer_parameters"),
        ),
        "notes": [str(note) for note in told["notes"]],
        "differences": differences(told["settings"], _DEFAULTS),
        "settings": [(key, flow(value)) for key, value in _resolved(told["settings"]).items()],
        "environment": flatten(told["environment"]),
        "commands": nextsteps.after_pruning(folder),
        "load": nextsteps.load_snippet_of(folder),
    }


def _resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the iterations that the method took where none were given."""
    way = WAYS.get(settings["method"])
    return {**settings, "iterations": settings.get("iterations") or (way and way.iterations)}


def _calibrated_on(told: dict[str, Any]) -> str:
    """What the method looked at, in words; empty where that was nothing."""
    if told.get("calibration_sequences") == 0:
        return ""
    return " of ".join(filter(None, (told.get("calibration"), told["data"])))


def _cards(told: dict[str, Any]) -> list[dict[str, str]]:
    cards = [
        {
            "label": "parameters",
            "value": figures.count(told["parameters"]),
            "under": f"{figures.share(told['removed_share'])} fewer than {figures.count(told['original_parameters'])}",
        },
        {
            "label": "time to prune",
            "value": figures.duration(told["seconds"]),
            "under": f"on {told['calibration']}" if "calibration" in told else "",
        },
    ]
    if figures.is_number(told.get("held_out_loss_before")):
        value = told.get("held_out_loss")
        said = f"from {figures.loss(told['held_out_loss_before'])}; token perplexity {figures.perplexity(value)}"
        cards.insert(
            1,
            {
                "label": "loss on text held back",
                "value": figures.loss(value),
                "under": f"{said}, {told['settings']['sample_length']} tokens",
            },
        )
    return cards


def shape_rows(
    shapes: Sequence[Shape],
    original: Sequence[Shape],
    parameters: Sequence[int] | None = None,
    parameters_before: Sequence[int] | None = None,
) -> list[tuple[str, ...]]:
    """Rows of the table of shapes: layer, then query heads, key-value groups and channels, and parameters where they
    are known of both models, `now of before`."""
    before = original if len(original) == len(shapes) else None  # whole layers went: the others are numbered anew
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    rows = []
    for index, shape in enumerate(shapes):
        cells = [f"{shape[name]:,}" + (f" of {before[index][name]:,}" if before else "") for name in names]
        if parameters is not None and parameters_before is not None:
            had = f" of {parameters_before[index]:,}" if before else ""
            cells.append(f"{parameters[index]:,}{had}")
        rows.append((str(index), *cells))
    return rows
