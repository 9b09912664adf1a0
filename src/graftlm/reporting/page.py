"""What every page has in common: a template, pictures inside it, nested values as rows."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2


def template(name: str) -> jinja2.Template:
    """A page of reporting/templates."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graftlm.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


@dataclass(frozen=True)
class Plot:
    """A picture inside a page."""

    alt: str
    source: str


def inline(path: Path) -> str:
    """A PNG as an address that needs no other file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value) of nested mappings; lists on one line."""
    if isinstance(value, Mapping):
        return [
            pair for key, item in value.items() for pair in flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]
