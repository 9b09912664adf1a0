"""The control: plain training with the same tokens, order, schedule and seed, in a process of its own.

Its own process gives it its own peak of memory, and the first run's memory back before it begins. Where a run has
several processes, they train the control after it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from graftlm.configuring import dump_yaml
from graftlm.errors import UserError
from graftlm.files import read_json, write_text
from graftlm.methods.sparse_settings import ReweightingSettings
from graftlm.training.child import start_training
from graftlm.training.config import DistributedConfig, RunConfig
from graftlm.training.distributed import on_main, world_size


def control_config(config: RunConfig, stage_starts: Sequence[int]) -> RunConfig:
    """The control of `config`, whose learning rate follows stages that began at those steps; all samples count
    alike."""
    folder = str(Path(config.output_dir) / "control")
    return dataclasses.replace(
        config,
        method="full",
        control=False,
        output_dir=folder,
        stage_starts=tuple(stage_starts),
        reweighting=ReweightingSettings(),
    )


def run_control(
    config: RunConfig, stage_starts: Sequence[int], train_one: Callable[..., Any], *, resume: bool
) -> dict[str, Any]:
    """Run the control of `config`, or go on with it; returns its summary. train_one: run.py's, where the processes of
    the run train it themselves."""
    control = control_config(config, stage_starts)
    folder = Path(control.output_dir)
    finished = folder / "summary.json"
    if world_size() > 1:
        if not on_main(finished.exists):
            _run_here(control, resume, train_one)
    elif not finished.exists():
        control = dataclasses.replace(control, distributed=DistributedConfig())  # nobody to share with
        given = folder / "given.yaml"
        write_text(given, dump_yaml(control))
        clear_device_cache(garbage_collection=True)  # the run is over: its GPU memory is the control's
        with start_training(given, resume=resume) as process:
            status = process.wait()
        if status != 0:
            raise UserError(
                f"the control stopped (exit code {status}), see above; the run itself is whole, and "
                f"`graftlm train {config.output_dir}/config.yaml --resume` goes on with the control"
            )
        given.unlink(missing_ok=True)
    summary: dict[str, Any] = on_main(lambda: read_json(finished))
    return summary


def _run_here(control: RunConfig, resume: bool, train_one: Callable[..., Any]) -> None:
    """The processes of the run train once more: they cannot start others that would meet one another. Memory of a GPU
    is measured anew; that of a process without one is the larger of both runs'."""
    clear_device_cache(garbage_collection=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    train_one(control, resume=resume)
