"""A pruned model on disk: a checkpoint that opens anywhere, a card, and pruning.json, which says how it came about."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftlm.environment import describe_environment
from graftlm.models import save_model
from graftlm.pruning.base import Pruned
from graftlm.pruning.card import pruned_card
from graftlm.pruning.ways import calibration_in_words, sequences_seen

SUMMARY = "pruning.json"


def save_pruned(
    pruned: Pruned | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    card: str | None = None,
    base_model: str = "",
    data: str = "",
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint, README.md and, of a Pruned, pruning.json; all of it or nothing.

    Layers of one shape make a stock checkpoint. Others come with a copy of their class's file and an `auto_map`, so
    that `trust_remote_code=True` opens them where graftlm is not installed; models.load_model needs neither.

    Args:
        card: Markdown; None: pruned_card.
        base_model: what was pruned, as the person named it.
        data: the calibration text, in words.
        extra: further entries of pruning.json, as JSON values.

    Raises UserError when the disk is full or cannot be written.
    """
    model = pruned.model if isinstance(pruned, Pruned) else pruned
    texts = {}
    if isinstance(pruned, Pruned):
        summary = {**summary_of(pruned, base_model, data), **(extra or {}), "environment": describe_environment()}
        texts[SUMMARY] = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    card = pruned_card(pruned, base_model, data, extra) if card is None else card
    save_model(model, tokenizer, folder, card=card, texts=texts)


def summary_of(pruned: Pruned, base_model: str = "", data: str = "") -> dict[str, Any]:
    """What pruning.json says of `pruned`, its environment apart; shapes are those of every layer, outermost first."""
    return {
        "model": base_model,
        "method": pruned.settings.method,
        "settings": asdict(pruned.settings),
        "data": data,
        "calibration": calibration_in_words(pruned.settings),
        "calibration_sequences": sequences_seen(pruned.settings),
        "original_parameters": pruned.original_parameters,
        "parameters": pruned.parameters,
        "removed_share": 1 - pruned.parameters / pruned.original_parameters,
        "seconds": round(pruned.seconds, 3),
        "original_shapes": [shape.overrides() for shape in pruned.original_shapes],
        "shapes": [shape.overrides() for shape in pruned.shapes],
        "steps": [
            {**asdict(step), "shapes": [shape.overrides() for shape in step.shapes], "seconds": round(step.seconds, 3)}
            for step in pruned.steps
        ],
        "notes": list(pruned.notes),
    }
