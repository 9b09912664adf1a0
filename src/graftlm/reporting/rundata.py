"""A run folder, read back: what plots, report and table are made from."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open

from graftlm.errors import UserError
from graftlm.files import read_json

Activations = Mapping[str, Mapping[str, Mapping[int, np.ndarray]]]
"""{when: {"heads" or "channels": {layer: float32 [components]}}}: mean over samples of the squared norm."""

KINDS = ("heads", "channels")


@dataclass(frozen=True)
class RunData:
    """What a run folder holds. Whatever is not there yet is empty, so a run still going can be read."""

    folder: Path
    metrics: tuple[dict[str, Any], ...] = ()
    """Lines of metrics.jsonl, in order."""
    summary: dict[str, Any] = field(default_factory=dict)
    """summary.json; empty until the run has ended."""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    activations: Activations = field(default_factory=dict)
    activation_samples: int | None = None
    """Sequences that the activations are averaged over."""
    control: "RunData | None" = None

    @property
    def finished(self) -> bool:
        """Whether the run wrote its summary."""
        return bool(self.summary)

    @property
    def method(self) -> str:
        return str(self.outcome.get("method") or self.config.get("method") or "unknown")

    @property
    def stages(self) -> list[dict[str, Any]]:
        return list(self.summary.get("stages") or [])

    @cached_property
    def outcome(self) -> dict[str, Any]:
        """The summary; before the run has ended, as much of it as metrics.jsonl and the config tell."""
        if self.summary:
            return self.summary
        known: dict[str, Any] = {key: self.config[key] for key in ("method", "model") if key in self.config}
        if self.metrics:
            known |= {"steps": self.metrics[-1].get("step"), "tokens": self.metrics[-1].get("tokens")}
            known["seconds"] = self.metrics[-1].get("seconds")
        if evaluated := [line["loss"] for line in self.metrics if line.get("event") == "eval"]:
            known |= {"eval_loss_start": evaluated[0], "eval_loss_end": evaluated[-1]}
        rates = [line["tokens_per_second"] for line in self.metrics if line.get("tokens_per_second")]
        if rates:
            known["tokens_per_second"] = float(np.mean(rates))
        return known

    def series(self, event: str, *keys: str) -> tuple[np.ndarray, ...]:
        """One float64 array [lines] per key, over the lines of `event` that have a number under every key."""
        rows = [
            [line[key] for key in keys]
            for line in self.metrics
            if line.get("event") == event and all(isinstance(line.get(key), int | float) for key in keys)
        ]
        table = np.array(rows, dtype=np.float64).reshape(len(rows), len(keys))
        return tuple(table.T)

    def eval_when(self, *moments: str) -> list[dict[str, Any]]:
        """Evaluations at the given moments (before_fusion, after_fusion, ...)."""
        return [line for line in self.metrics if line.get("event") == "eval" and line.get("when") in moments]


def read_run(folder: Path) -> RunData:
    """Read a run folder, and the control inside it. Raises UserError if it is missing, empty of a run, or broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run folder that `graftlm train` wrote (output_dir)")
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "summary.json", "config.yaml")):
        raise UserError(
            f"{folder}: not a run folder (no config.yaml, metrics.jsonl or summary.json); "
            "name the output_dir of `graftlm train`"
        )
    summary = _mapping(folder / "summary.json", read_json)
    activations, samples = read_activations(folder / "activations.safetensors")
    control: RunData | None = None
    if (folder / "control").is_dir() and any((folder / "control").iterdir()):
        control = _read_control(folder / "control", summary.get("control"))
    elif summary.get("control"):
        control = RunData(folder / "control", summary=summary["control"])
    return RunData(
        folder=folder,
        metrics=_read_metrics(folder / "metrics.jsonl"),
        summary=summary,
        config=_mapping(folder / "config.yaml", _read_yaml),
        environment=_mapping(folder / "environment.json", read_json),
        activations=activations,
        activation_samples=samples,
        control=control,
    )


def _read_control(folder: Path, summary: dict[str, Any] | None) -> RunData:
    """The control's half. Its summary may stand in the run's own summary only."""
    activations, samples = read_activations(folder / "activations.safetensors")
    return RunData(
        folder=folder,
        metrics=_read_metrics(folder / "metrics.jsonl"),
        summary=_mapping(folder / "summary.json", read_json) or summary or {},
        config={"method": "full"},
        activations=activations,
        activation_samples=samples,
    )


def _mapping(path: Path, read: Any) -> dict[str, Any]:
    """Content of a JSON or YAML file that must be a mapping; {} where the file is not there yet."""
    if not path.is_file():
        return {}
    value = read(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping at the top, found {type(value).__name__}; the file is not ours")
    return value


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error


def _read_metrics(path: Path) -> tuple[dict[str, Any], ...]:
    """Lines of metrics.jsonl. The last one may be torn by a kill; a broken line before it is a UserError.

    A run resumed from a checkpoint repeats the steps after it: what was written the first time is dropped.
    """
    if not path.is_file():
        return ()
    lines = path.read_bytes().splitlines()
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    last = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not a metrics line; delete that line and try again") from error
        if step < last:
            records = {key: old for key, old in records.items() if old["step"] <= step}
        moment = (record.get("event"), step, record.get("when"))
        records.pop(moment, None)  # so that the later one also stands at its own place in the order
        records[moment] = record
        last = step
    return tuple(records.values())


def read_activations(path: Path) -> tuple[Activations, int | None]:
    """activations.safetensors as {when: {kind: {layer: array}}} and its number of samples; ({}, None) if not there."""
    if not path.is_file():
        return {}, None
    found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    try:
        with safe_open(path, framework="np") as file:
            samples = (file.metadata() or {}).get("samples")
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                match = re.fullmatch(rf"(.+)/({'|'.join(KINDS)})/(\d+)", key)
                if match is None:
                    raise UserError(f"{path}: key {key!r} is not WHEN/heads|channels/LAYER; the file is not ours")
                when, kind, layer = match.groups()
                found.setdefault(when, {}).setdefault(kind, {})[int(layer)] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); the file is torn, delete it and try again") from error
    # Numeric order of layers and not that of strings, where 10 comes before 2.
    ordered = {
        when: {kind: dict(sorted(layers.items())) for kind, layers in kinds.items()} for when, kinds in found.items()
    }
    return ordered, int(samples) if samples is not None else None
