"""Tensors and optimizer state on disk: safetensors and JSON, atomic, never pickle."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graftlm.errors import UserError
from graftlm.files import atomic_path

APEX_FILE = "apex.safetensors"
"""In a checkpoint: Apex.state_dict()."""


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Any = None) -> None:
    """Write named tensors, and any JSON value beside them, to one safetensors file."""
    # Clones: safetensors refuses tensors that share memory, and a contiguous view may be part of a larger one.
    whole = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(whole, temporary, metadata={"json": json.dumps(metadata)})


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what save_tensors wrote. A missing or torn file is a UserError."""
    return load_tensors_and_metadata(path)[0]


def load_tensors_and_metadata(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Any]:
    with _open(path) as file:
        return {k: file.get_tensor(k) for k in file.keys()}, json.loads((file.metadata() or {}).get("json", "null"))  # noqa: SIM118


def check_tensors(path: str | os.PathLike[str]) -> Any:
    """The JSON value beside the tensors of a file; reads the header only. Raises UserError if the file is missing or
    shorter than its header says."""
    with _open(path) as file:
        return json.loads((file.metadata() or {}).get("json", "null"))


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Any]:
    mend = f"delete the checkpoint {Path(path).parent} and go on from an earlier one"
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; {mend}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: torn or not ours ({error}); {mend}") from error


def plain_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors, by "<number of the parameter>.<key>", and JSON values (groups, plain)."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        nested = [v for v in values.values() if isinstance(v, dict)]  # bitsandbytes: what belongs to 8 bits
        for key, value in (item for part in (values, *nested) for item in part.items()):
            if isinstance(value, dict):
                continue
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    groups = [{k: v for k, v in group.items() if not isinstance(v, Tensor)} for group in state["param_groups"]]
    return tensors, {"groups": groups, "plain": plain}


def restore_optimizer(
    path: str | os.PathLike[str],
    optimizer: torch.optim.Optimizer,
    state: dict[int, dict[str, Any]],
    groups: list[dict[str, Any]],
) -> None:
    """Give an optimizer the state of each parameter, by number, and its groups; `path` is named in errors."""
    now = optimizer.state_dict()["param_groups"]
    if [len(g["params"]) for g in now] != [len(g["params"]) for g in groups]:
        raise UserError(f"{path}: written with other settings than these; resume with the configuration of that run")
    # JSON turns tuples (betas) into lists, which some optimizers refuse.
    groups = [{k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in g.items()} for g in groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_optimizer(path: str | os.PathLike[str], optimizer: torch.optim.Optimizer, extra: Any = None) -> None:
    """Write an optimizer's state_dict, and any JSON value beside it."""
    tensors, plain = plain_optimizer(optimizer)
    save_tensors(path, tensors, {**plain, "extra": extra})


def load_optimizer(path: str | os.PathLike[str], optimizer: torch.optim.Optimizer) -> Any:
    """Load what save_optimizer wrote; returns the JSON value beside it."""
    tensors, metadata = load_tensors_and_metadata(path)
    state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in metadata["plain"].items()}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    restore_optimizer(path, optimizer, state, metadata["groups"])
    return metadata["extra"]
