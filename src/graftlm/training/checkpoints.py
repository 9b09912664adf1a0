"""Checkpoints of a run: everything of one moment, in one folder that is there whole or not at all; never a pickle.

One process and ddp write the model as a stock checkpoint, and the rest beside it. Under fsdp2 every process writes its
shards (torch.distributed.checkpoint, in its safetensors form), and any number of processes can go on from them.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import zeros as sharded_zeros

from graftlm.apex import CONTAINER
from graftlm.checkpointing import (
    APEX_FILE,
    check_tensors,
    load_optimizer,
    load_tensors,
    load_tensors_and_metadata,
    plain_optimizer,
    restore_optimizer,
    save_optimizer,
    save_tensors,
)
from graftlm.errors import UserError
from graftlm.files import atomic_folder, read_json, write_json
from graftlm.quiet import quiet_transformers
from graftlm.sharding import is_sharded
from graftlm.training.distributed import gathered, is_main, rank, world_size

OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
STATE_FILE = "trainer_state.json"
METHOD_FILE = "method.safetensors"
PHASE_FILE = "phase.safetensors"
"""In the place of OPTIMIZER_FILE, in a checkpoint that a phase begins with (phases.py)."""
SHARDS = "shards"
"""Folder of what fsdp2 saves, and beside it the file of what is no tensor."""
PLAIN_FILE = "shards.json"


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first; names that begin with a dot were being written when the run was killed."""
    found = [p for p in (run / "checkpoints").glob("step-*") if (p / STATE_FILE).is_file()]
    numbers = {int(number): p for p in found if (number := p.name.removeprefix("step-")).isdecimal()}
    return [numbers[step] for step in sorted(numbers)]


def check_checkpoint(checkpoint: Path, *, sharded: bool) -> None:
    """Raise UserError, naming the file and what to do, if a file of `checkpoint` is missing or torn, or if another
    strategy wrote it."""
    try:
        read_json(checkpoint / STATE_FILE)
        if (checkpoint / SHARDS).is_dir():
            read_json(checkpoint / PLAIN_FILE)
    except UserError as error:
        raise UserError(f"{error}; delete the checkpoint {checkpoint} and go on from an earlier one") from error
    if (checkpoint / SHARDS).is_dir() != sharded:
        wrote, now = ("fsdp2", "another") if not sharded else ("another strategy", "fsdp2")
        raise UserError(
            f"{checkpoint}: written under {wrote}, and distributed.strategy is now {now}; resume with the strategy "
            "that the run began with (ddp and none may take each other's place)"
        )
    files = {checkpoint / RANDOM_FILE, *checkpoint.glob("*.safetensors"), *(checkpoint / SHARDS).glob("*.safetensors")}
    begins_phase = (checkpoint / PHASE_FILE).exists()
    for file in sorted(files | ({checkpoint / OPTIMIZER_FILE} if not sharded and not begins_phase else set())):
        check_tensors(file)


def saved_extra(checkpoint: Path) -> Any:
    """The JSON value that `save_state` was given, without reading a tensor."""
    if (checkpoint / SHARDS).is_dir():
        return read_json(checkpoint / PLAIN_FILE)["extra"]
    begins_phase = (checkpoint / PHASE_FILE).exists()
    return check_tensors(checkpoint / (PHASE_FILE if begins_phase else OPTIMIZER_FILE))["extra"]


@contextmanager
def shared_folder(path: Path) -> Iterator[Path]:
    """atomic_folder for all processes of a run: each may write into it, and the first one gives it its name when all
    have."""
    if world_size() == 1:
        with atomic_folder(path) as temporary:
            yield temporary
        return
    named: list[Any] = [None]
    if is_main():
        with atomic_folder(path) as temporary:
            named = [str(temporary)]
            dist.broadcast_object_list(named, src=0)
            yield temporary
            dist.barrier()
    else:
        dist.broadcast_object_list(named, src=0)
        yield Path(named[0])
        dist.barrier()
    dist.barrier()  # until it has its name


# -- model, optimizer and Apex ----------------------------------------------------------------------------------------


def save_state(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, apex: Mapping[str, Tensor] | None, extra: Any
) -> None:
    """Write model, optimizer, the state of an Apex, and any JSON value, into `folder` (shared_folder's)."""
    if is_sharded(model):
        _save_shards(folder, model, optimizer, apex, extra)
    elif is_main():
        with quiet_transformers():
            model.save_pretrained(folder)
        save_optimizer(folder / OPTIMIZER_FILE, optimizer, extra)
        if apex is not None:
            save_tensors(folder / APEX_FILE, apex)


def load_optimizer_state(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Load the optimizer; returns the JSON value that `save_state` was given."""
    if not is_sharded(model):
        return load_optimizer(checkpoint / OPTIMIZER_FILE, optimizer)
    plain = read_json(checkpoint / PLAIN_FILE)
    parameters = dict(model.named_parameters())
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}

    def empty(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        parameter = parameters[name.rpartition(".")[0]].detach()
        return torch.zeros_like(parameter, dtype=dtype) if size == parameter.shape else torch.zeros(size, dtype=dtype)

    state = {int(i): dict(values) for i, values in plain["optimizer"]["plain"].items()}
    for name, tensor in _load_shards(checkpoint, "optimizer.", empty).items():
        parameter, _, key = name.rpartition(".")
        state.setdefault(index[id(parameters[parameter])], {})[key] = tensor
    restore_optimizer(checkpoint, optimizer, state, plain["optimizer"]["groups"])
    return plain["extra"]


def load_sharded_model(checkpoint: Path, model: nn.Module) -> None:
    """Load the weights of a sharded model, in place."""
    now = _own_tensors(model)
    loaded = _load_shards(checkpoint, "model.", lambda name, _size, _dtype: now[name])
    if missing := sorted(now.keys() - loaded.keys()):
        raise UserError(f"{checkpoint}: lacks {missing[0]}; delete the checkpoint and go on from an earlier one")


def load_apex_state(checkpoint: Path, model: nn.Module) -> dict[str, Tensor]:
    """The state of the Apex; raw panels and slices of sharded weights are sharded as those are."""
    if not is_sharded(model):
        return load_tensors(checkpoint / APEX_FILE)

    def empty(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        kind, _, panel = name.partition(".")
        if kind in ("raw", "start"):
            weight = model.get_parameter(panel.partition(":")[0])
            if isinstance(weight, DTensor):
                return sharded_zeros(size, dtype=dtype, device_mesh=weight.device_mesh, placements=[Shard(2)])
        if name.startswith("container."):
            return torch.zeros_like(model.get_parameter(f"{CONTAINER}.{name.removeprefix('container.')}").detach())
        return torch.zeros(size, dtype=dtype)

    return _load_shards(checkpoint, "apex.", empty)


def save_method_state(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write what another method than APEX keeps beside model and optimizer (graftlm.methods)."""
    if state:
        save_tensors(folder / METHOD_FILE, state)


def load_method_state(checkpoint: Path) -> dict[str, Tensor]:
    path = checkpoint / METHOD_FILE
    return load_tensors(path) if path.exists() else {}


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """state_dict with tied weights once."""
    seen: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: t.detach() for name, t in state.items() if seen.setdefault(id(t), name) == name}


def _save_shards(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, apex: Mapping[str, Tensor] | None, extra: Any
) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    tensors, plain = plain_optimizer(optimizer)
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = {f"model.{name}": value for name, value in _own_tensors(model).items()}
    for key, value in tensors.items():
        place, _, kind = key.partition(".")
        state[f"optimizer.{order[int(place)]}.{kind}"] = value
    state |= {f"apex.{name}": value for name, value in (apex or {}).items()}
    if not folder.is_dir():
        raise UserError(f"{folder}: not there for process {rank()}; put output_dir on a disk that all machines share")
    writer = HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
    dcp.save(state, storage_writer=writer)
    if is_main():
        write_json(folder / PLAIN_FILE, {"optimizer": plain, "extra": extra})


def _load_shards(
    checkpoint: Path, prefix: str, empty: Callable[[str, torch.Size, torch.dtype], Tensor]
) -> dict[str, Tensor]:
    """What was saved under names that begin with `prefix`, each into the tensor that `empty` gives for it."""
    reader = HuggingFaceStorageReader(str(checkpoint / SHARDS))
    wanted: dict[str, Tensor] = {}
    for name, found in reader.read_metadata().state_dict_metadata.items():
        if name.startswith(prefix):
            wanted[name] = empty(name.removeprefix(prefix), found.size, found.properties.dtype)  # type: ignore[union-attr]
    dcp.load(wanted, storage_reader=reader)
    return {name.removeprefix(prefix): tensor for name, tensor in wanted.items()}


# -- random numbers ---------------------------------------------------------------------------------------------------


def _random_file(number: int) -> str:
    return RANDOM_FILE if number == 0 else f"random-{number}.safetensors"


def save_random_states(folder: Path) -> None:
    """Write the state of random numbers of every process, one file each (the first process writes them)."""
    for number, (tensors, plain) in enumerate(gathered(_random_state())):
        if is_main():
            save_tensors(folder / _random_file(number), tensors, plain)


def load_random_state(checkpoint: Path) -> None:
    """Go on with this process's random numbers; one that the checkpoint does not know draws a stream of its own."""
    path = checkpoint / _random_file(rank())
    if not path.exists() and not is_main():
        torch.manual_seed(torch.initial_seed() + int(checkpoint.name.rpartition("-")[2]))
        return
    tensors, plain = load_tensors_and_metadata(path)
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    name, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"torch": torch.random.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": [version, list(internal), gauss], "numpy": [name, position, has_gauss, cached]}
