"""The model card of an exported folder: what it was made from, and what became of its shapes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from graftlm.pruning.card import layer_table
from graftlm.pruning.shapes import LayerShape
from graftlm.reporting.card import cell, code, front_matter, how_to_open

KEPT = ("license", "license_name", "license_link", "base_model", "datasets", "language")
"""What an exported model has in common with the one it was made from, in the front matter of cards."""


def source_card(model: str) -> tuple[dict[str, Any], str]:
    """Front matter and text of the card in the folder `model`; both empty where there is none, or it cannot be read."""
    file = Path(model) / "README.md"
    if not file.is_file():
        return {}, ""
    text = file.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\n(.*?)\n---\n?", text, re.DOTALL)
    try:
        matter = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        matter = {}
    return (matter if isinstance(matter, dict) else {}), text[head.end() :].strip() if head else text.strip()


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
        front_matter(["pruned"], model, more={key: matter[key] for key in KEPT if key in matter}),
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
