"""The model card that goes into a pruned model's folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from graftlm.models import has_own_class
from graftlm.pruning.base import Pruned
from graftlm.pruning.shapes import LayerShape, shapes_of
from graftlm.pruning.ways import calibration_in_words, sequences_seen
from graftlm.reporting import figures
from graftlm.reporting.card import cell, code, front_matter, how_to_open, kept_matter, markdown_table


def pruned_card(
    pruned: Pruned | PreTrainedModel,
    base_model: str = "",
    data: str = "",
    measured: Mapping[str, Any] | None = None,
) -> str:
    """A Hugging Face model card (Markdown with YAML front matter) with the shape of every layer.

    `base_model`: what was pruned (a Hub id, a folder, a file or a built-in name; only a Hub id goes into the front
    matter); `data`: the calibration text, in words; `measured`: what pruning.json says of it besides, of which the
    losses on what was held back are shown.
    """
    model = pruned.model if isinstance(pruned, Pruned) else pruned
    before = pruned.original_shapes if isinstance(pruned, Pruned) else None
    name = cell(Path(base_model).name) if base_model else "Model"
    title = f"# {name}, pruned"
    if isinstance(pruned, Pruned):
        title += f" with {figures.PRUNING_NAMES.get(pruned.settings.method, pruned.settings.method)}"
    parts = [
        front_matter(["pruned"], base_model, more=kept_matter(base_model)),
        title,
        _what_was_done(pruned, base_model, data) if isinstance(pruned, Pruned) else "",
        "## How to use it",
        how_to_open(has_own_class(model)),
        "## Layers",
        layer_table(shapes_of(model), before),
        "## Limits",
        "Those of the model that it was pruned from, and what went with the parts that are gone: it has not been "
        "trained again since, and such a model is usually worse than the original until it is (`graftlm train`, "
        f"`graftlm shrink`). {_losses(measured or {})}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _losses(measured: Mapping[str, Any]) -> str:
    before, after = measured.get("held_out_loss_before"), measured.get("held_out_loss")
    if before is None or after is None:
        return "Nothing was measured here."
    return (
        f"Measured here: a loss of {before:.4f} nats a token before and {after:.4f} after, on "
        f"{measured['held_out_sequences']} sequences of {measured['held_out_length']} tokens of the calibration text "
        "that were held back; nothing else."
    )


def layer_table(shapes: Sequence[LayerShape], before: Sequence[LayerShape] | None = None) -> str:
    """Markdown: a row for every layer. `before`: shapes of the original, shown where it has as many layers."""
    compared = before is not None and len(before) == len(shapes)
    rows = [["layer", "query heads", "key-value groups", "FFN channels"]]
    for i, shape in enumerate(shapes):
        row = [f"{width:,}" for width in _widths(shape)]
        if before is not None and compared:
            row = [f"{width} of {old:,}" for width, old in zip(row, _widths(before[i]), strict=True)]
        rows.append([str(i), *row])
    biased = any(shape.output_biases for shape in shapes)
    note = "\n\nOutput projections have biases that stand in for the mean of what is gone." if biased else ""
    return markdown_table(rows) + note


def _widths(shape: LayerShape) -> tuple[int, int, int]:
    return shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size


def _what_was_done(pruned: Pruned, base_model: str, data: str) -> str:
    settings, steps = pruned.settings, len(pruned.steps)
    source = f"`{code(base_model)}`" if base_model else "A model"
    text = (
        f"{source} of {pruned.original_parameters:,} parameters, pruned to {pruned.parameters:,} "
        f"({1 - pruned.parameters / pruned.original_parameters:.1%} fewer) by graftlm, in "
        f"{figures.duration(pruned.seconds)}"
    )
    text += f" and {steps} iteration{'' if steps == 1 else 's'}" if steps else ""
    if sequences_seen(settings):
        text += (
            f". Calibrated on {calibration_in_words(settings)}{f' of {code(data)}' if data else ''}, drawn anew in "
            f"each step (seed {settings.seed})."
        )
    else:
        text += f". It looked at no calibration text (seed {settings.seed})."
    if len(pruned.shapes) < len(pruned.original_shapes):
        text += f" {len(pruned.original_shapes) - len(pruned.shapes)} of {len(pruned.original_shapes)} layers went."
    elif len(set(pruned.shapes)) == 1:
        text += " Every layer is of the same shape."
    settings_line = "Settings, steps and the environment are in `pruning.json`."
    return "\n\n".join([text, *(f"- {cell(note)}" for note in pruned.notes), settings_line])
