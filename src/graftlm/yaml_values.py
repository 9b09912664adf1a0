"""One scalar of a YAML file as the type of its field, read from its text as it is written."""

import contextlib
import difflib
import math
from collections.abc import Sequence
from typing import Any

import yaml
from yaml.nodes import Node, ScalarNode

from graftlm.arguments import parameter_count, percent
from graftlm.yaml_nodes import is_null


class NotAllowed(Exception):
    """Its text says what is allowed instead."""


def choices(allowed: Sequence[str], given: str) -> str:
    """What is allowed in place of `given`, the nearest first."""
    near = difflib.get_close_matches(given, allowed, n=1)
    rest = [word for word in allowed if word not in near]
    listed = ", ".join(rest) if len(rest) == 1 else f"one of {', '.join(rest)}"
    return f"{near[0]} (the nearest)" + (f", or {listed}" if rest else "") if near else listed


def count(node: Node) -> int:
    """A whole number as people write it (100M, 1.5B), or as any other is written."""
    with contextlib.suppress(NotAllowed):
        return int(scalar(node, int))
    try:
        return parameter_count(node.value if isinstance(node, ScalarNode) else "")
    except ValueError as error:
        raise NotAllowed("a whole number (100M, 1.5B, 134515008)") from error


def scalar(node: Node, kind: Any) -> Any:
    """The value of type `kind` (None, bool, str, int, float). Raises NotAllowed."""
    # The text as written is read by the field's type, not by YAML 1.1's guess, which takes 1e-4 for text and 010 for 8.
    if kind is type(None):
        if is_null(node):
            return None
        raise NotAllowed("null")
    if kind is bool:
        if isinstance(node, ScalarNode) and node.value.lower() in yaml.SafeLoader.bool_values:
            return yaml.SafeLoader.bool_values[node.value.lower()]
        raise NotAllowed("true or false")
    if kind is str:
        if isinstance(node, ScalarNode) and not is_null(node):
            return node.value
        raise NotAllowed("text")
    text = node.value if isinstance(node, ScalarNode) else ""
    with contextlib.suppress(ValueError):
        if kind is int:
            return int(text)
    with contextlib.suppress(ValueError):
        number = float(text)
        if kind is float and math.isfinite(number):
            return number
        if kind is int and number.is_integer():  # 1e6
            return int(number)
    hint = percent(node.value) if kind is float and isinstance(node, ScalarNode) else ""
    raise NotAllowed("a whole number" if kind is int else f"a number ({node.value} {hint})" if hint else "a number")
