"""What makes two runs the same run: settings, content of data and model; not where they lie or when they were made."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.configuring import config_to_dict
from graftlm.content import path_content
from graftlm.training.config import SOURCE_KEYS, RunConfig, SourceConfig
from graftlm.training.data.readers import ROW_SUFFIXES, suffix
from graftlm.training.data.sources import HUB_PREFIX, source_content

NOT_PART = {"output_dir", "cache_dir", "control", "report_to", "logging_steps", "save_steps", "save_total_limit"}
"""Settings that change neither a weight nor an evaluation."""
NAMED = (*SOURCE_KEYS, "model", "chat_template", "distillation")
"""Settings that name files or folders."""
SETTINGS = "settings.json"
"""Of a run folder of a comparison or a pilot: settings_of its config."""


def settings_of(config: RunConfig) -> dict[str, Any]:
    """All settings that a run's outcome depends on, as JSON; files stand there by their content.

    A dataset or model of the Hub stands by its name: that it changed under it is not noticed.
    """
    settings = {key: value for key, value in config_to_dict(config).items() if key not in NOT_PART}
    return settings | {key: content_of(config, key) for key in NAMED}


def content_of(config: RunConfig, key: str) -> Any:
    """One of NAMED by what is in its files, as JSON. Raises UserError for data that are not there."""
    if key in SOURCE_KEYS:
        return content_of_sources(getattr(config, key))
    if key == "distillation":
        return {**config_to_dict(config.distillation), "teacher": by_content(config.distillation.teacher)}
    return by_content(getattr(config, key))


def content_of_sources(sources: Sequence[SourceConfig]) -> list[dict[str, Any]]:
    """Sources of data with the content of their files."""
    return [
        {**dataclasses.asdict(source), "path": _source_name(source), "content": source_content(source)}
        for source in sources
    ]


def by_content(name: str | None) -> Any:
    """A file or folder with its content; what is not here (a model of the Hub, a built-in one) by its name."""
    path = Path(str(name)).expanduser()
    if name is None or not path.exists():
        return name
    return {"path": path.resolve().name, "content": path_content(path)}


def key_of(settings: Mapping[str, Any]) -> str:
    """The name of a run: a hash of where its settings differ from the defaults, so that a setting added to the program
    later leaves it as it is. What a file is called is no part of it."""
    return hashlib.sha256(json.dumps(_changed(settings), sort_keys=True).encode()).hexdigest()[:20]


def same_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a finished run's settings are those of another with the same key: a default may have changed since, or
    the same bytes be read as rows and not as text, which a file's suffix decides."""
    return _agree(_without_names(old, as_read=True), _without_names(new, as_read=True))


def _agree(old: Any, new: Any) -> bool:
    """Equal, but for keys that only one of them has: that version knew only what is now the default."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return all(_agree(old[key], new[key]) for key in old if key in new)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_agree, old, new))
    return bool(old == new)


def _changed(settings: Mapping[str, Any]) -> dict[str, Any]:
    defaults = config_to_dict(RunConfig(model="", data=(SourceConfig(""),)))
    source = {f.name: f.default for f in dataclasses.fields(SourceConfig) if f.name != "path"}
    changed: dict[str, Any] = {}
    for key, value in settings.items():
        if key in SOURCE_KEYS:
            value = [{k: v for k, v in _without_names(entry).items() if v != source.get(k)} for entry in value]
        elif isinstance(defaults.get(key), dict) and isinstance(value, Mapping):
            value = {k: v for k, v in value.items() if v != defaults[key].get(k)} or defaults[key]
        if value != defaults.get(key):
            changed[key] = _without_names(value)
    return changed


def _without_names(value: Any, *, as_read: bool = False) -> Any:
    """Settings without what files are called; as_read: with whether their names say that they hold rows."""
    if isinstance(value, Mapping) and "content" in value:
        found = {key: item for key, item in value.items() if key != "path" or value["content"] is None}
        rows = suffix(Path(str(value.get("path")))) in ROW_SUFFIXES
        return found | ({"rows": rows} if as_read else {})
    if isinstance(value, Mapping):
        return {key: _without_names(item, as_read=as_read) for key, item in value.items()}
    return [_without_names(item, as_read=as_read) for item in value] if isinstance(value, list | tuple) else value


def _source_name(source: SourceConfig) -> str:
    return source.path if source.path.startswith(HUB_PREFIX) else Path(source.path).expanduser().resolve().name
