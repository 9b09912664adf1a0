"""Runs of several processes on the CPU (gloo), started as torchrun starts them but from one that has imported all."""

import contextlib
import os
import socket
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from own_process import PROCESSES
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_runs import tiny_config, write_texts

from graftlm.errors import AgreedError, UserError
from graftlm.models import load_tokenizer, save_model
from graftlm.training.config import DistributedConfig, RunConfig, SourceConfig

SECONDS = 150


@dataclass
class Outcome:
    code: int | None
    """Exit code; None: it was still running when time was up."""
    told: str
    """What it wrote to stderr."""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _work(rank: int, world: int, port: int, log: Path, function, *args) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    with log.open("w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        try:
            function(*args)
        except UserError as error:
            if not isinstance(error, AgreedError):
                print(f"graftlm: {error}", file=sys.stderr)
            code = 2
        except BaseException:
            traceback.print_exc()
            code = 1
        else:
            code = 0
    os._exit(code)


def launch(folder: Path, world: int, function, *args, each=None) -> list[Outcome]:
    """`function(*args)` in `world` processes, or of process r `function(*each[r])`; as torchrun does, the others are
    stopped when one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    logs = [folder / f"stderr-{world}-{rank}" for rank in range(world)]
    running = [
        PROCESSES.Process(target=_work, args=(rank, world, port, logs[rank], function, *(each[rank] if each else args)))
        for rank in range(world)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(SECONDS)
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    return [Outcome(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def train(config: RunConfig, resume: bool = False) -> None:
    """One run, as each process of it does it."""
    from graftlm.training import distributed, run

    distributed.join(config.distributed)
    run.agree("the settings", run.config_to_dict(config), "mend it")
    run.train_one(config, resume=resume)
    distributed.leave()


def run_of(folder: Path, world: int, strategy: str, *, resume: bool = False, name: str = "run", **changes) -> Path:
    """Train `tiny_config` in `world` processes with 8 sequences a step; returns the run folder."""
    config = spread_config(folder, world, strategy, name=name, **changes)
    outcomes = launch(folder / "logs", world, train, config, resume)
    assert [o.code for o in outcomes] == [0] * world, "\n".join(o.told for o in outcomes)
    return Path(config.output_dir)


def spread_config(folder: Path, world: int, strategy: str, *, name: str = "run", **changes) -> RunConfig:
    """20 steps of 8 sequences in 2 micro-batches, spread over `world` processes; one epoch is longer than that."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "text.jsonl"
    if not data.exists():
        write_texts(data, 40)
    held_out = folder / "evaluated.jsonl"
    if not held_out.exists():
        write_texts(held_out, 1, first=100)
    changes = {"eval_data": (SourceConfig(str(held_out)),), **changes}
    settings = {"max_steps": 20, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4 // world, **changes}
    config = tiny_config(folder, data=data, **settings)
    return replace(config, output_dir=str(folder / name), distributed=DistributedConfig(strategy))


def saved_model(folder: Path, family: str, **changes) -> str:
    """A tiny model of `family` with the built-in tokenizer, on disk."""
    tokenizer = load_tokenizer("tiny-llama")
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    save_model(tiny_model(family, vocab_size=264, **special, **changes), tokenizer, folder)
    return str(folder)


def relative_difference(ours: Path, theirs: Path, without: str = "nothing") -> float:
    """Of the weights of two runs' models, by the norm over all of them (leaving out names that hold `without`)."""
    a, b = (load_file(run / "model" / "model.safetensors") for run in (ours, theirs))
    assert a.keys() == b.keys()
    names = [name for name in b if without not in name]
    apart = torch.stack([(a[n].double() - b[n].double()).norm() for n in names]).norm()
    return float(apart / torch.stack([b[n].double().norm() for n in names]).norm())
