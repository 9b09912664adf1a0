"""YAML as nodes, which are kept and not turned into values, because a node knows its file and line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from graftlm.errors import UserError

COMMAND_LINE = "command line"
"""The name of the file of what was given there."""


def parse_yaml(text: str, name: str) -> Node | None:
    """The node of a text; places in it are said to be in `name`. None for an empty text."""
    loader = yaml.SafeLoader(text)
    loader.name = name
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def node_of(values: Any, name: str) -> Node:
    """The node of what was not read from a file: values of Python, said to be in `name`."""
    node = parse_yaml(yaml.safe_dump(plain(values)), name)
    assert node is not None  # which only an empty text has
    return node


def plain(value: Any) -> Any:
    """`value` as YAML and JSON have it, which know no tuples: of dicts, lists and scalars."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def parse_file(file: str | None, otherwise: str = "") -> MappingNode:
    """The mapping that a file holds. Raises UserError for one that is missing (and says what to do `otherwise`), not
    text, not YAML, or no mapping."""
    if file is None:
        return empty_mapping(COMMAND_LINE)
    try:
        node = parse_yaml(Path(file).read_text(encoding="utf-8"), file)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; name a YAML file{otherwise}") from error
    except IsADirectoryError as error:
        raise UserError(f"{file}: is a folder; name a YAML file, such as {file.rstrip('/')}/config.yaml") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text ({error})") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {str(error).splitlines()[0]}") from error
    if node is None:
        return empty_mapping(file)
    if not isinstance(node, MappingNode):
        raise UserError(f"{place(node)}must be `key: value` lines, e.g. model: tiny-llama")
    return node


def no_line(name: str) -> yaml.Mark:
    """A place in `name` without a line: -1."""
    return yaml.Mark(name, 0, -1, 0, None, 0)


def empty_mapping(name: str) -> MappingNode:
    """A mapping without keys that was not written anywhere in `name`."""
    return MappingNode("tag:yaml.org,2002:map", [], no_line(name))


def place(node: Node) -> str:
    """`file:line: `, or `command line: `, to put in front of a message."""
    mark = node.start_mark
    if mark.name == COMMAND_LINE or mark.line < 0:
        return f"{mark.name}: "
    return f"{mark.name}:{mark.line + 1}: "


def is_null(node: Node) -> bool:
    """Whether nothing, or null, is written there."""
    return isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def child_of(node: Node, key: str) -> Node | None:
    """The value of `key`; None if there is no such key, or the node is no mapping."""
    if isinstance(node, MappingNode):
        return next((value for name, value in node.value if name.value == key), None)
    return None
