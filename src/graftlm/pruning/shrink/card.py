"""The model card of a model that was shrunk: all its phases, and the shape of every layer."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from graftlm.models import has_own_class
from graftlm.pruning.card import layer_table
from graftlm.pruning.shapes import LayerShape, shapes_of
from graftlm.pruning.shrink.config import Shrink
from graftlm.pruning.shrink.story import rows
from graftlm.reporting import figures
from graftlm.reporting.card import cell, code, front_matter, how_to_open, kept_matter, markdown_table


def shrunk_card(model: PreTrainedModel, task: Shrink, summary: dict[str, Any]) -> str:
    """A Hugging Face model card (Markdown with YAML front matter). `summary`: story.summarise's."""
    original = task.settings.model
    hub = [source.path.removeprefix("hub:") for source in task.settings.data if source.path.startswith("hub:")]
    before = [LayerShape(**shape) for shape in summary["original_shapes"]]
    parts = [
        front_matter(["pruned"], original, hub, more=kept_matter(original)),
        f"# {cell(Path(original).name)}, shrunk to {figures.count(summary['parameters'])} parameters",
        _what_was_done(task, summary),
        "## Phases",
        markdown_table(rows(summary)),
        "Losses are means over held-out tokens in nats: before the phase prunes, after that, and after it has trained. "
        "Calibration: tokens that pruning looked at. Seconds: of pruning, with opening, measuring and saving, + of "
        "training.",
        "## How to use it",
        how_to_open(has_own_class(model)),
        "## Layers",
        layer_table(shapes_of(model), before),
        "## Limits",
        "Those of the model that it was pruned from and of the data it was trained on, and what went with the parts "
        "that are gone. Nothing was measured here but the loss on held-out data.",
        *(f"- {cell(note)}" for note in summary["notes"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_was_done(task: Shrink, summary: dict[str, Any]) -> str:
    before, after, phases = summary["original_parameters"], summary["parameters"], summary["interleaves"]
    trained = "APEX" if task.settings.recovery == "apex" else "plain training"
    times = f"{phases} phase{'' if phases == 1 else 's'} of pruning ({figures.PRUNING_NAMES[summary['method']]})"
    text = (
        f"`{code(summary['model'])}` of {before:,} parameters, shrunk to {after:,} ({1 - after / before:.1%} fewer) by "
        f"graftlm, in {times} and {trained}: {figures.count(summary['tokens'])} tokens in "
        f"{figures.integer(summary['steps'])} optimizer steps with a peak learning rate of "
        f"{task.run.learning_rate:g}, {figures.duration(summary['total_seconds'])}."
    )
    if (teacher := task.run.distillation.teacher) is not None:
        text += f" It learned from the predictions of `{code(teacher)}` too (weight {task.run.distillation.weight:g})."
    return text
