"""Over how many processes a run is spread, and on what: of this machine and launcher, or as a person names it."""

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from graftlm.errors import UserError
from graftlm.sharding import mixed_axes
from graftlm.training.config import RunConfig


@dataclass(frozen=True)
class Layout:
    """How a run is spread."""

    strategy: str
    """none, ddp, fsdp2."""
    processes: int
    device: str
    """cuda or cpu."""
    assumed: bool
    """Planned for GPUs, on a machine without one."""

    @property
    def shards(self) -> int:
        """In how many parts weights, gradients and optimizer state lie."""
        return self.processes if self.strategy == "fsdp2" else 1


def run_device(model: PreTrainedModel) -> torch.device:
    """Where training would run on this machine: Trainer's choice, so far as it can be known beforehand."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def layout_of(config: RunConfig, model: PreTrainedModel, gpus: int | None = None) -> Layout:
    """`gpus`: how many a plan is for, there or not; None: what this machine has, and the launcher's processes.

    Raises UserError where the strategy does not allow so many, or they do not divide a matrix.
    """
    strategy, here = config.distributed.strategy, run_device(model).type
    processes = int(os.environ.get("WORLD_SIZE", 1)) if gpus is None else gpus
    if processes > 1 and strategy == "none":
        asked = f"--gpus {gpus} asks for {gpus}" if gpus is not None else f"{processes} processes were launched"
        raise UserError(
            f"distributed.strategy: none is one process, and {asked}; set distributed.strategy=ddp (or fsdp2)"
        )
    if strategy == "fsdp2" and config.method == "apex":
        mixed_axes(model, processes, followers=config.apex.trains == "half")
    return Layout(strategy, processes, here if gpus is None else "cuda", gpus is not None and here != "cuda")
