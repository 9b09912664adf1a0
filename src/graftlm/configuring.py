"""From YAML and `key=value` words to a checked RunConfig, and back. Every error names file, line and key."""

import contextlib
import dataclasses
import difflib
import math
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from graftlm.apex_config import ApexConfig, apply_preset
from graftlm.errors import UserError
from graftlm.training.config import DistributedConfig, RunConfig, SourceConfig

_COMMAND_LINE = "command line"
_SOURCE_KEYS = ("data", "eval_data")
# Words from other trainers that no string distance leads to the right key.
_SYNONYMS = {"lr": "learning_rate", "dataset": "data", "train_file": "data", "model_name_or_path": "model"}
_EXAMPLES = {
    "model": "give model: a folder, a Hub id, a .gguf file, or tiny-llama",
    "data": "give data: a file, a folder, or hub:OWNER/NAME",
    "path": "give path: a file, a folder, or hub:OWNER/NAME",
}


def load_config(path: str | Path | None, overrides: Sequence[str] = (), **given: Any) -> RunConfig:
    """Read a run's config from a YAML file, lay `given` and then `overrides` over it, and check it.

    Args:
        path: YAML file with the fields of RunConfig; None: no file. Relative paths inside it are relative to the
            current directory, not to the file.
        overrides: `key=value` words; dots reach into nested keys: `apex.k_heads=0.2`, `data.0.weight=2`.
        given: top-level keys as plain Python values (`model="tiny-llama"`); None is skipped.

    Raises:
        UserError: unreadable file, unknown or repeated key, or a value that is not allowed.
    """
    file = None if path is None else str(path)
    root = _file_tree(file)
    for key, value in given.items():
        if value is not None:
            plain = _tree(yaml.safe_dump(value if isinstance(value, list | dict) else str(value)), _COMMAND_LINE)
            assert plain is not None
            _assign(root, [key], plain)
    _normalise_sources(root)
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{_COMMAND_LINE}: {word!r} is not KEY=VALUE, as in learning_rate=1e-4")
        _assign(root, key.split("."), _override_value(key, value))
        _normalise_sources(root)
    return _read(root, RunConfig, "")


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """`config` as plain dicts, lists and scalars; its YAML, loaded again, gives an equal RunConfig."""
    return _plain(dataclasses.asdict(config))


def dump_yaml(config: RunConfig) -> str:
    """The resolved config as YAML, keys in the order of RunConfig."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# --- YAML nodes: kept, not turned into values, because a node knows its file and line --------------------------------


def _tree(text: str, name: str) -> Node | None:
    loader = yaml.SafeLoader(text)
    loader.name = name
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _file_tree(file: str | None) -> MappingNode:
    if file is None:
        return _mapping(_COMMAND_LINE)
    try:
        node = _tree(Path(file).read_text(encoding="utf-8"), file)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; name a YAML file, or give --model and --data") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text ({error})") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {str(error).splitlines()[0]}") from error
    if node is None:
        return _mapping(file)
    if not isinstance(node, MappingNode):
        raise UserError(f"{_at(node)}must be a list of `key: value` lines, e.g. model: tiny-llama")
    return node


def _mark(name: str) -> yaml.Mark:
    return yaml.Mark(name, 0, -1, 0, None, 0)  # line -1: the place has no line


def _mapping(name: str) -> MappingNode:
    return MappingNode("tag:yaml.org,2002:map", [], _mark(name))


def _at(node: Node) -> str:
    """`file:line: `, or `command line: `, to put in front of a message."""
    mark = node.start_mark
    if mark.name == _COMMAND_LINE or mark.line < 0:
        return f"{mark.name}: "
    return f"{mark.name}:{mark.line + 1}: "


def _is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _child(node: Node, key: str) -> Node | None:
    if isinstance(node, MappingNode):
        return next((value for name, value in node.value if name.value == key), None)
    return None


# --- overrides -------------------------------------------------------------------------------------------------------


def _override_value(key: str, text: str) -> Node:
    """The node of an override's value. Only brackets and quotes make it YAML: `a: b` or `#` in a path stay text."""
    if text[:1] in ("[", "{", '"', "'"):
        try:
            node = _tree(text, _COMMAND_LINE)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or error
            raise UserError(f"{_COMMAND_LINE}: {key}: {text!r} is not valid YAML: {problem}") from error
        assert node is not None
        return node
    tag = yaml.SafeLoader("").resolve(ScalarNode, text, (True, False))
    return ScalarNode(tag, text, _mark(_COMMAND_LINE))


def _assign(root: MappingNode, parts: list[str], value: Node) -> None:
    """Put `value` at `parts`, making mappings on the way. A list wants an index; a list of one goes without, too."""
    node: Node = root
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, SequenceNode):
            if not part.isdecimal() and len(node.value) == 1:
                node = node.value[0]
            elif part.isdecimal() and int(part) < len(node.value):
                if last:
                    node.value[int(part)] = value
                else:
                    node = node.value[int(part)]
                continue
            else:
                where = ".".join(parts[:depth])
                raise UserError(f"{_COMMAND_LINE}: {where}: has no entry {part!r}; there are {len(node.value)}, from 0")
        if not isinstance(node, MappingNode):
            where = ".".join(parts[:depth])
            raise UserError(f"{_COMMAND_LINE}: {'.'.join(parts)}: {where} holds no keys; give {where}=VALUE")
        child = _child(node, part)
        if last or child is None or _is_null(child):
            child = value if last else _mapping(_COMMAND_LINE)
            name = ScalarNode("tag:yaml.org,2002:str", part, _mark(_COMMAND_LINE))
            node.value = [pair for pair in node.value if pair[0].value != part] + [(name, child)]
        node = child


def _normalise_sources(root: MappingNode) -> None:
    """Write `data: FILE`, `data: {...}` and `data: [FILE, ...]` in the one form they stand for: a list of mappings."""
    for index, (name, node) in enumerate(root.value):
        if name.value not in _SOURCE_KEYS or _is_null(node):
            continue
        entries = node.value if isinstance(node, SequenceNode) else [node]
        sources = []
        for entry in entries:
            pairs = list(entry.value) if isinstance(entry, MappingNode) else None
            if isinstance(entry, ScalarNode):
                pairs = [(ScalarNode("tag:yaml.org,2002:str", "path", entry.start_mark), entry)]
            # A fresh mapping each: with YAML's anchors two keys can share a node, and an override must not change both.
            sources.append(entry if pairs is None else MappingNode("tag:yaml.org,2002:map", pairs, entry.start_mark))
        root.value[index] = (name, SequenceNode("tag:yaml.org,2002:seq", sources, node.start_mark))


# --- nodes to checked values -----------------------------------------------------------------------------------------


class _NotAllowed(Exception):
    """Its text says what is allowed instead."""


def _read(node: Node, annotation: Any, key: str) -> Any:
    """The value of `node` as `annotation` asks; `key` is its dotted name, for messages."""
    try:
        return _value(node, annotation, key)
    except _NotAllowed as error:
        kind = "a sequence" if isinstance(node, SequenceNode) else "a mapping"
        shown = repr(node.value) if isinstance(node, ScalarNode) else kind
        raise UserError(f"{_at(node)}{key}: {shown} must be {error}") from error


def _value(node: Node, annotation: Any, key: str) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if _is_null(node) and type(None) in arguments:
            return None
        allowed = []
        for option in arguments:
            try:
                return _value(node, option, key)
            except _NotAllowed as error:
                allowed.append(str(error))
        raise _NotAllowed(" or ".join(allowed))
    if origin is tuple:
        entries = node.value if isinstance(node, SequenceNode) else [] if _is_null(node) else [node]
        return tuple(_read(entry, arguments[0], key) for entry in entries)
    if origin is dict:
        if not isinstance(node, MappingNode):
            raise _NotAllowed("a mapping, e.g. {name: value}")
        pairs = _pairs(node, key).items()
        return {name: _read(child, arguments[1], f"{key}.{name}") for name, (_, child) in pairs}
    if dataclasses.is_dataclass(annotation):
        return _dataclass(node, annotation, key)
    if origin is Literal:
        if isinstance(node, ScalarNode) and node.value in arguments:
            return node.value
        raise _NotAllowed(arguments[0] if len(arguments) == 1 else "one of " + ", ".join(arguments))
    return _scalar(node, annotation)


def _scalar(node: Node, kind: Any) -> Any:
    # The text as written is read by the field's type, not by YAML 1.1's guess, which takes 1e-4 for text and 010 for 8.
    if kind is type(None):
        if _is_null(node):
            return None
        raise _NotAllowed("null")
    if kind is bool:
        if isinstance(node, ScalarNode) and node.value.lower() in yaml.SafeLoader.bool_values:
            return yaml.SafeLoader.bool_values[node.value.lower()]
        raise _NotAllowed("true or false")
    if kind is str:
        if isinstance(node, ScalarNode) and not _is_null(node):
            return node.value
        raise _NotAllowed("text")
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
    raise _NotAllowed("a whole number" if kind is int else "a number")


def _pairs(node: MappingNode, key: str) -> dict[str, tuple[Node, Node]]:
    """Key -> (its node, its value's node); a key given twice is an error, where YAML would silently keep one."""
    pairs: dict[str, tuple[Node, Node]] = {}
    for name, value in node.value:
        if not isinstance(name, ScalarNode):
            raise UserError(f"{_at(name)}{key or 'the config'}: a key must be one word")
        if name.value in pairs:
            first = pairs[name.value][0].start_mark.line + 1
            raise UserError(f"{_at(name)}key {_dotted(key, name.value)!r} is given twice (first in line {first})")
        pairs[name.value] = (name, value)
    return pairs


def _dataclass(node: Node, kind: Any, key: str) -> Any:
    if not isinstance(node, MappingNode):
        example = next(iter(get_type_hints(kind)))
        raise _NotAllowed(f"a mapping, e.g. {{{example}: VALUE}}")
    hints = get_type_hints(kind)
    preset = None
    values = {}
    for name, (name_node, child) in _pairs(node, key).items():
        if kind is ApexConfig and name == "preset":
            preset = _read(child, str, _dotted(key, name))
        elif name not in hints:
            raise UserError(f"{_at(name_node)}unknown key {_dotted(key, name)!r}{_nearest(key, name)}")
        else:
            values[name] = _read(child, hints[name], _dotted(key, name))
    for field in dataclasses.fields(kind):
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{_at(node)}{_dotted(key, field.name)}: is missing; {_EXAMPLES[field.name]}")
    try:
        return kind(**values) if preset is None else apply_preset(preset, values)
    except UserError as error:
        raise UserError(f"{_at(_named_by(str(error), node))}{error}") from error


def _named_by(message: str, node: MappingNode) -> Node:
    """The node of the key that `message` starts with; a place without a line when that key was not written."""
    found: Node | None = None
    inner: Node = node
    for part in message.partition(":")[0].split("."):
        for name, value in inner.value if isinstance(inner, MappingNode) else []:
            if name.value == part:
                found, inner = name, value
    return found or _mapping(node.start_mark.name)


def _dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def all_keys() -> dict[str, str]:
    """Every key that a config may have, by its dotted name -> the key alone (`apex.k_heads` -> `k_heads`)."""
    keys = {name: name for name in get_type_hints(RunConfig)}
    keys |= {f"apex.{name}": name for name in [*get_type_hints(ApexConfig), "preset"]}
    keys |= {f"distributed.{name}": name for name in get_type_hints(DistributedConfig)}
    return keys | {f"{source}.{name}": name for source in _SOURCE_KEYS for name in get_type_hints(SourceConfig)}


def _nearest(key: str, name: str) -> str:
    """` (did you mean X?)`: that very key of another level, a near one of the same level, or any near one."""
    name = _SYNONYMS.get(name, name)
    keys = all_keys()
    same_level = {dotted: alone for dotted, alone in keys.items() if dotted == _dotted(key, alone)}
    for pool, cutoff in ((keys, 1.0), (same_level, 0.75), (keys, 0.75), (same_level, 0.6), (keys, 0.6)):
        close = difflib.get_close_matches(name, list(pool.values()), n=1, cutoff=cutoff)
        if close:
            return f" (did you mean {next(dotted for dotted, alone in pool.items() if alone == close[0])}?)"
    inside = [dotted for dotted, alone in keys.items() if len(name) > 3 and name in alone]
    return f" (did you mean {inside[0]}?)" if inside else "; docs/configuration.md lists all keys"
