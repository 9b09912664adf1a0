"""The control: plain training with the same tokens, order, schedule and seed, in a process of its own.

Its own process gives it its own peak of memory, and the first run's memory back before it begins. Where a run has
several processes, they train the control after it.
"""

import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from graftlm.configuring import dump_yaml, load_config
from graftlm.errors import UserError
from graftlm.files import read_json, write_text
from graftlm.methods.sparse_settings import ReweightingSettings
from graftlm.training.arguments import GIVEN, TENSORBOARD
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


def run_control(config: RunConfig, stage_starts: Sequence[int], *, resume: bool) -> dict[str, Any]:
    """Run the control of `config`, or go on with it; returns its summary."""
    control = control_config(config, stage_starts)
    folder = Path(control.output_dir)
    finished = folder / "summary.json"
    if world_size() > 1:
        if not on_main(finished.exists):
            _run_here(control, resume)
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


def start_training(config: Path, *, resume: bool, lean: bool = False, **streams: Any) -> "subprocess.Popen[bytes]":
    """A process that runs train_one on a config file, and ends with this one. streams: stdout, stderr, as Popen's."""
    flags = [*(["--resume"] if resume else []), *(["--lean"] if lean else [])]
    command = [sys.executable, "-m", "graftlm.training.control", str(config), *flags]
    environment = {key: value for key, value in os.environ.items() if key != TENSORBOARD or key in GIVEN}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, **streams)


def _run_here(control: RunConfig, resume: bool) -> None:
    """The processes of the run train once more: they cannot start others that would meet one another. Memory of a GPU
    is measured anew; that of a process without one is the larger of both runs'."""
    from graftlm.training.run import train_one  # here: run.py imports this module

    clear_device_cache(garbage_collection=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    train_one(control, resume=resume)


def end_with_parent() -> None:
    """Leave when the pipe to the parent closes: killed with -9, it could not tell, and a control left behind would
    write beside the one that --resume starts."""
    while os.read(sys.stdin.fileno(), 1):  # not sys.stdin.read: Python would wait for it when it ends
        pass
    os._exit(1)


def main(arguments: Sequence[str]) -> int:
    threading.Thread(target=end_with_parent, daemon=True).start()
    from graftlm.training.run import train_one  # here: run.py imports this module

    try:
        train_one(load_config(Path(arguments[0])), resume="--resume" in arguments, lean="--lean" in arguments)
    except UserError as error:
        print(f"graftlm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
