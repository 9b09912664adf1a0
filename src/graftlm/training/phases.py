"""A phase of a longer run: where it goes on with the data, the learning rate and, if wanted, the optimizer's moments of
the phase before it, although its model has become another one (a smaller one: graftlm.pruning.shrink).

It begins with a checkpoint like any other, but for PHASE_FILE in the place of the optimizer's own: moments by the name
of their parameter, since the optimizer may come to number its parameters in another way.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.checkpointing import load_tensors_and_metadata, restore_optimizer, save_tensors
from graftlm.errors import UserError
from graftlm.training.checkpoints import OPTIMIZER_FILE, PHASE_FILE, RANDOM_FILE, STATE_FILE

Slices = Mapping[str, tuple[int, Tensor]]
"""pruning.surgery.kept_slices: by parameter, a dimension and the positions along it that stay."""


def begins_phase(checkpoint: Path) -> bool:
    """Whether it is a checkpoint that a phase begins with."""
    return (checkpoint / PHASE_FILE).exists()


def write_phase_start(
    folder: Path,
    ended: Path,
    *,
    eval_loss: float | None,
    shapes: Mapping[str, torch.Size] | None = None,
    slices: Slices | None = None,
) -> None:
    """Write into `folder` what a phase begins with, besides the weights.

    Args:
        ended: the last checkpoint of the phase before.
        eval_loss: of the phase's model before it is trained.
        shapes: of that phase's parameters, by name: their moments are kept. None: a fresh optimizer.
        slices: what of them stays.

    Raises UserError for an optimizer whose moments cannot be cut.
    """
    tensors, metadata = load_tensors_and_metadata(ended / OPTIMIZER_FILE)
    extra = metadata["extra"]
    kept, plain = {}, {}
    if shapes is not None:
        names = extra["run"]["parameters"]
        for key, tensor in tensors.items():
            number, _, kind = key.partition(".")
            name = names[int(number)]
            if name in shapes:
                kept[f"{kind}/{name}"] = _cut(tensor, name, shapes[name], (slices or {}).get(name))
        plain = {names[int(number)]: values for number, values in metadata["plain"].items()}
    told = {**extra["run"], "stages": [], "eval_loss_start": eval_loss, "metrics_bytes": 0}
    save_tensors(folder / PHASE_FILE, kept, {"plain": plain, "extra": {**extra, "run": told}})
    for name in (RANDOM_FILE, STATE_FILE):
        shutil.copyfile(ended / name, folder / name)


def _cut(tensor: Tensor, name: str, shape: torch.Size, positions: tuple[int, Tensor] | None) -> Tensor:
    if tensor.dim() == 0 or tensor.numel() == 1:  # a count of steps
        return tensor
    if tensor.shape != shape:
        raise UserError(
            f"keep_moments: the optimizer's state of {name} is {list(tensor.shape)}, not {list(shape)}, so no part of "
            "it can be kept; set optim: adamw_torch, or keep_moments: false"
        )
    return tensor if positions is None else tensor.index_select(*positions)


def load_phase_start(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Give a new optimizer the moments of `checkpoint`; returns what else is told there."""
    tensors, metadata = load_tensors_and_metadata(checkpoint / PHASE_FILE)
    names = {id(p): name for name, p in model.named_parameters()}
    numbers = {names.get(id(p), ""): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if name in numbers:  # what pruning took away whole has none
            state.setdefault(numbers[name], {})[kind] = tensor
    for name, values in metadata["plain"].items():
        if numbers.get(name) in state:
            state[numbers[name]].update(values)
    restore_optimizer(checkpoint, optimizer, state, optimizer.state_dict()["param_groups"])
    return metadata["extra"]
