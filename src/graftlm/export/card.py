"""The model card of an exported folder: what it was made from, and what became of its shapes."""

from collections.abc import Sequence
from pathlib import Path

from graftlm.pruning.card import layer_table
from graftlm.pruning.shapes import LayerShape
from graftlm.reporting.card import cell, code, front_matter, how_to_open, kept_matter, source_card

OF_ITS_TRAINING = ("datasets",)
"""What an exported model has in common with the one it was made from, beside what every model made from one has."""


def copied_card(model: str) -> str:
    """Of a stock checkpoint that was saved as it was: the source's card, and where it came from."""
    matter, text = source_card(model)
    title = "" if text else f"# {cell(Path(model).name)}"
    parts = [title, text, f"Saved by graftlm from `{code(model)}`, with the same weights."]
    if not text:
        parts.append(how_to_open(False))
    return "\n\n".join([front_matter([], model, more=matter), *filter(None, parts)]) + "\n"


def padded_card(
    model: str, before: Sequence[LayerShape], after: LayerShape, parameters_before: int, parameters: int
) -> str:
    """Of a pruned model whose layers were filled up with zeros to one shape."""
    matter, _ = source_card(model)
    parts = [
        front_matter(["pruned"], model, more=kept_matter(model, *OF_ITS_TRAINING)),
        f"# {cell(Path(model).name)}, padded",
        f"`{code(model)}`, whose layers are of different widths, filled up with zeros by graftlm to "
        f"{after.num_attention_heads} heads, {after.num_key_value_heads} key-value groups and "
        f"{after.intermediate_size:,} FFN channels in every layer: {parameters_before:,} parameters became "
        f"{parameters:,}. It computes what that model computes, at the size and speed of its widest layer, in a class "
        "that transformers has.",
        "## How to use it",
        how_to_open(False),
        "## Layers before padding",
        layer_table(before),
        "## Limits",
        "Those of the model it was made from, whose card says how that was made"
        + (f" (licence: {matter['license']})." if "license" in matter else "."),
    ]
    return "\n\n".join(parts) + "\n"
