"""What every page has in common: a template, pictures inside it, nested values as rows."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from graftlm.reporting.figures import MISSING
from graftlm.reporting.style import headline_of
from graftlm.yaml_nodes import plain


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


def picture(path: Path, what: str) -> Plot:
    """A figure that style.save wrote, for who cannot see it as what it is and what its title says."""
    headline = headline_of(path)
    return Plot(f"{what}: {headline}" if headline else what, inline(path))


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


def differences(values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, value, default) of every value that differs from its default, in the order of `values`."""
    found: list[tuple[str, str, str]] = []
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            found += differences(value, default, f"{prefix}{key}.")
        elif key not in defaults:
            found.append((prefix + key, flow(value), MISSING))
        elif plain(value) != plain(default):
            found.append((prefix + key, flow(value), flow(default)))
    return found


def as_yaml(values: Mapping[str, Any]) -> str:
    """A config as its file has it."""
    return yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True)


def flow(value: Any) -> str:
    """A value on one line, as YAML."""
    text = yaml.safe_dump(plain(value), default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")
