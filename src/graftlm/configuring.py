"""From YAML and `key=value` words to a checked RunConfig, and back. Every error names file, line and key."""

import copy
import dataclasses
import difflib
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from graftlm.apex_config import ApexConfig, apply_preset
from graftlm.arguments import Count
from graftlm.errors import UserError
from graftlm.training.config import SOURCE_KEYS, RunConfig, SourceConfig
from graftlm.whose_config import SECTIONS, check_verb, section_of
from graftlm.yaml_nodes import (
    COMMAND_LINE,
    child_of,
    empty_mapping,
    is_null,
    no_line,
    node_of,
    parse_file,
    parse_yaml,
    place,
    plain,
)
from graftlm.yaml_values import NotAllowed, choices, count, scalar

# Words from other trainers that no string distance leads to the right key.
_SYNONYMS = {"lr": "learning_rate", "dataset": "data", "train_file": "data", "model_name_or_path": "model"}
_EXAMPLES = {
    "model": "give model: a folder, a Hub id, a .gguf file, or the built-in smollm2 or tiny-llama",
    "data": "give data: a file, a folder, or hub:OWNER/NAME",
    "path": "give path: a file, a folder, or hub:OWNER/NAME",
    "base": "give base: what all arms share, e.g. {model: M, data: D}",
    "variants": "give variants: e.g. {apex: {method: apex}}",
    "train": "{learning_rate: 1e-4}",
    "prune": "{samples: 64}",
    "perplexity": "give perplexity: a held-out text, e.g. wikitext2/test.txt",
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
    root = parse_file(file, ", or give --model and --data")
    check_verb(root, RunConfig)
    for key, value in given.items():
        if value is not None:
            _assign(root, [key], node_of(value if isinstance(value, list | dict) else str(value), COMMAND_LINE))
    _normalise_sources(root)
    for keys, node in _read_overrides(overrides):
        _assign(root, keys, node)
        _normalise_sources(root)
    return _read(root, RunConfig, "")


def load_dataclass(path: str | Path, kind: type[Any], overrides: Sequence[str] = ()) -> Any:
    """Read another config dataclass in the same way. A field of type Node keeps its part of the file unread."""
    root = parse_file(str(path))
    check_verb(root, kind)
    _normalise_sources(root)
    for keys, node in _read_overrides(overrides):
        _assign(root, keys, node)
        _normalise_sources(root)
    return _read(root, kind, "")


def load_sources(named: str) -> tuple[SourceConfig, ...]:
    """What --data names: a file, a folder or hub:OWNER/NAME; or a config (.yaml), of which its data: are taken.

    Raises UserError for a config that cannot be read or has no data.
    """
    if Path(named).suffix not in (".yaml", ".yml"):
        return (SourceConfig(named),)
    root = parse_file(named)
    _normalise_sources(root)
    sources, _ = take(root, "data", tuple[SourceConfig, ...])
    if not sources:
        raise UserError(f"{place(root)}data: no source given; name a file, a folder, or hub:OWNER/NAME")
    found: tuple[SourceConfig, ...] = sources
    return found


def config_from_layers(base: Node, *layers: Node, kind: type[Any] = RunConfig, section: str = "") -> Any:
    """The config of a node with others laid over it, in which keys may have dots. Errors name the lines of each, and
    keys as they stand in a file that has all of it under `section`."""
    root = copy.deepcopy(base)
    if not isinstance(root, MappingNode):
        raise UserError(f"{place(base)}must be `key: value` lines, e.g. model: tiny-llama")
    _normalise_sources(root)
    for layer in layers:
        if section and not is_null(layer) and not isinstance(layer, MappingNode):
            raise UserError(f"{place(layer)}{section}: must be a mapping, e.g. {_EXAMPLES[section]}")
        _lay(root, copy.deepcopy(layer), [])
        _normalise_sources(root)
    return _read(root, kind, section)


def take(node: Node, key: str, annotation: Any = Node) -> tuple[Any, Node]:
    """The value of `key` in a mapping (None if it has none), read as `annotation`, and the mapping without that key."""
    child = child_of(node, key)
    if child is None or not isinstance(node, MappingNode):
        return None, node
    rest = [pair for pair in node.value if pair[0].value != key]
    return _read(child, annotation, key), MappingNode(node.tag, rest, node.start_mark)


def place_of(node: Node, key: str = "") -> str:
    """`file:line: ` of a key (dots reach inside) of `node`, or of `node` itself, to put in front of a message."""
    if not key or not isinstance(node, MappingNode):
        return place(node)
    written = next((name for name, _ in node.value if name.value == key), None)
    return place(written or _named_by(key, node))


def config_to_dict(config: Any) -> dict[str, Any]:
    """`config`, a RunConfig or another config dataclass, as plain dicts, lists and scalars; its YAML, loaded again,
    gives an equal one."""
    found: dict[str, Any] = plain(dataclasses.asdict(config))
    return found


def dump_yaml(config: RunConfig) -> str:
    """The resolved config as YAML, keys in the order of RunConfig."""
    return dump_values(config_to_dict(config))


def dump_values(values: dict[str, Any]) -> str:
    """Resolved values as a config file has them."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


# --- overrides -------------------------------------------------------------------------------------------------------


def overrides_node(words: Sequence[str]) -> MappingNode:
    """What `key=value` words say, as a mapping to be laid over others."""
    root = empty_mapping(COMMAND_LINE)
    for keys, node in _read_overrides(words):
        _assign(root, keys, node)
    return root


def _read_overrides(words: Sequence[str]) -> Iterator[tuple[list[str], Node]]:
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{COMMAND_LINE}: {word!r} is not KEY=VALUE, as in learning_rate=1e-4")
        yield key.split("."), _override_value(key, value)


def _override_value(key: str, text: str) -> Node:
    """The node of an override's value. Only brackets and quotes make it YAML: `a: b` or `#` in a path stay text."""
    if text[:1] in ("[", "{", '"', "'"):
        try:
            node = parse_yaml(text, COMMAND_LINE)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or error
            raise UserError(f"{COMMAND_LINE}: {key}: {text!r} is not valid YAML: {problem}") from error
        assert node is not None
        return node
    tag = yaml.SafeLoader("").resolve(ScalarNode, text, (True, False))
    return ScalarNode(tag, text, no_line(COMMAND_LINE))


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
                raise UserError(f"{place(value)}{where}: has no entry {part!r}; there are {len(node.value)}, from 0")
        if not isinstance(node, MappingNode):
            where = ".".join(parts[:depth])
            raise UserError(f"{place(value)}{'.'.join(parts)}: {where} holds no keys; give {where}=VALUE")
        child = child_of(node, part)
        if last or child is None or is_null(child):
            child = value if last else MappingNode("tag:yaml.org,2002:map", [], value.start_mark)
            name = ScalarNode("tag:yaml.org,2002:str", part, value.start_mark)
            node.value = [pair for pair in node.value if pair[0].value != part] + [(name, child)]
        node = child


def _lay(root: MappingNode, layer: Node, prefix: list[str]) -> None:
    """Put every key of `layer` into `root`; what stands beside them in nested mappings stays."""
    if is_null(layer):
        return
    if not isinstance(layer, MappingNode):
        raise UserError(f"{place(layer)}must be a mapping, e.g. {{learning_rate: 1e-4}}")
    for name, (_, value) in _pairs(layer, ".".join(prefix)).items():
        parts = [*prefix, *name.split(".")]
        if isinstance(value, MappingNode):
            _lay(root, value, parts)
        else:
            _assign(root, parts, value)


def _normalise_sources(root: MappingNode) -> None:
    """Write `data: FILE`, `data: {...}` and `data: [FILE, ...]` in the one form they stand for: a list of mappings."""
    for index, (name, node) in enumerate(root.value):
        if name.value not in SOURCE_KEYS or is_null(node):
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


def _read(node: Node, annotation: Any, key: str) -> Any:
    """The value of `node` as `annotation` asks; `key` is its dotted name, for messages."""
    try:
        return _value(node, annotation, key)
    except NotAllowed as error:
        kind = "a sequence" if isinstance(node, SequenceNode) else "a mapping"
        shown = repr(node.value) if isinstance(node, ScalarNode) else kind
        raise UserError(f"{place(node)}{key}: {shown} must be {error}") from error


def _value(node: Node, annotation: Any, key: str) -> Any:
    if annotation is Node:
        return node
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if is_null(node) and type(None) in arguments:
            return None
        allowed = []
        for option in arguments:
            try:
                return _value(node, option, key)
            except NotAllowed as error:
                allowed.append(str(error))
        raise NotAllowed(" or ".join(allowed))
    if origin is tuple:
        entries = node.value if isinstance(node, SequenceNode) else [] if is_null(node) else [node]
        return tuple(_read(entry, arguments[0], key) for entry in entries)
    if origin is dict:
        if not isinstance(node, MappingNode):
            raise NotAllowed("a mapping, e.g. {name: value}")
        pairs = _pairs(node, key).items()
        return {name: _read(child, arguments[1], f"{key}.{name}") for name, (_, child) in pairs}
    if dataclasses.is_dataclass(annotation):
        return _dataclass(node, annotation, key)
    if origin is Literal:
        if isinstance(node, ScalarNode) and node.value in arguments:
            return node.value
        raise NotAllowed(choices(arguments, str(node.value) if isinstance(node, ScalarNode) else ""))
    return count(node) if annotation == Count else scalar(node, annotation)


def _pairs(node: MappingNode, key: str) -> dict[str, tuple[Node, Node]]:
    """Key -> (its node, its value's node); a key given twice is an error, where YAML would silently keep one."""
    pairs: dict[str, tuple[Node, Node]] = {}
    for name, value in node.value:
        if not isinstance(name, ScalarNode):
            raise UserError(f"{place(name)}{key or 'the config'}: a key must be one word")
        if name.value in pairs:
            first = pairs[name.value][0].start_mark.line + 1
            raise UserError(f"{place(name)}key {_dotted(key, name.value)!r} is given twice (first in line {first})")
        pairs[name.value] = (name, value)
    return pairs


def _dataclass(node: Node, kind: Any, key: str) -> Any:
    if not isinstance(node, MappingNode):
        example = next(iter(get_type_hints(kind)))
        raise NotAllowed(f"a mapping, e.g. {{{example}: VALUE}}")
    hints = get_type_hints(kind, include_extras=True)
    preset = None
    values = {}
    for name, (name_node, child) in _pairs(node, key).items():
        if kind is ApexConfig and name == "preset":
            preset = _read(child, str, _dotted(key, name))
        elif name not in hints:
            raise UserError(f"{place(name_node)}unknown key {_dotted(key, name)!r}{_nearest(key, name, kind)}")
        else:
            values[name] = _read(child, hints[name], _dotted(key, name))
    for field in dataclasses.fields(kind):
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{place(node)}{_dotted(key, field.name)}: is missing; {_EXAMPLES[field.name]}")
    try:
        return kind(**values) if preset is None else apply_preset(preset, values)
    except UserError as error:
        section = section_of(key)
        full = f"{section}.{error}" if section and re.match(r"[a-z_.]+: ", str(error)) else error
        raise UserError(f"{place(_named_by(str(error), node))}{full}") from error


def _named_by(message: str, node: MappingNode) -> Node:
    """The node of the key that `message` starts with; a place without a line when that key was not written."""
    found: Node | None = None
    inner: Node = node
    for part in message.partition(":")[0].split("."):
        for name, value in inner.value if isinstance(inner, MappingNode) else []:
            if name.value == part:
                found, inner = name, value
    return found or empty_mapping(node.start_mark.name)


def _dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def all_keys() -> dict[str, str]:
    """Every key that a config may have, by its dotted name -> the key alone (`apex.k_heads` -> `k_heads`)."""
    hints = get_type_hints(RunConfig)
    keys = {name: name for name in hints}
    for key, kind in hints.items():
        if dataclasses.is_dataclass(kind):
            keys |= {f"{key}.{name}": name for name in get_type_hints(kind)}
    keys["apex.preset"] = "preset"
    return keys | {f"{source}.{name}": name for source in SOURCE_KEYS for name in get_type_hints(SourceConfig)}


def _keys_of(kind: type[Any], section: str = "") -> dict[str, str]:
    """Keys of a config class, as all_keys; of a run's classes, all that a run has."""
    found = all_keys() if _of_a_run(kind) else {name: name for name in get_type_hints(kind)}
    return {_dotted(section, dotted): alone for dotted, alone in found.items()}


def _of_a_run(kind: type[Any]) -> bool:
    """Whether a config class is a run's, or that of a part of one."""
    return kind in (RunConfig, SourceConfig, *get_type_hints(RunConfig).values())


def _nearest(key: str, name: str, kind: Any) -> str:
    """` (did you mean X?)`: that very key of another level, a near one of the same level, or any near one."""
    name = _SYNONYMS.get(name, name)
    of_a_run = _of_a_run(kind)
    own = _keys_of(kind, section_of(key) if of_a_run else key)
    keys = dict(own)
    for section, inner in SECTIONS.get(kind.__name__, {}).items():
        # A shrink's train.method follows from its recovery.
        keys |= {k: alone for k, alone in _keys_of(inner, section).items() if k != "train.method"}
    same_level = {dotted: alone for dotted, alone in keys.items() if dotted == _dotted(key, alone)}
    for pool, cutoff in ((keys, 1.0), (same_level, 0.75), (keys, 0.75), (same_level, 0.6), (keys, 0.6)):
        close = difflib.get_close_matches(name, list(pool.values()), n=1, cutoff=cutoff)
        if close:
            return f" (did you mean {next(dotted for dotted, alone in pool.items() if alone == close[0])}?)"
    inside = [dotted for dotted, alone in keys.items() if len(name) > 3 and name in alone]
    listed = "docs/configuration.md lists all keys" if of_a_run else f"keys are {', '.join(own)}"
    return f" (did you mean {inside[0]}?)" if inside else f"; {listed}"
