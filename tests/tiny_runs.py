"""Small data, configurations and comparisons for tests of whole runs."""

import contextlib
import dataclasses
import gc
import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graftlm.apex_config import ApexConfig
from graftlm.configuring import load_config
from graftlm.models import load_model, load_tokenizer, save_model
from graftlm.training import run, run_trainer
from graftlm.training.config import RunConfig, SourceConfig
from graftlm.training.control import control_config

torch.set_num_threads(1)  # products are tiny: with more, threads only wait for each other
gc.freeze()  # every run collects garbage twice; what was imported is none, and takes long to look through

WORDS = [
    *("the", "a", "cat", "dog", "runs", "sees", "house"),
    *("tree", "over", "under", "big", "small", "then", "fish"),
]
ONLY_TIMES = {"seconds", "tokens_per_second", "peak_memory_bytes", "plan"}
"""Keys of metrics.jsonl and summary.json that differ between equal runs."""


def words(count: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def write_texts(path: Path, documents: int = 5, first: int = 0) -> Path:
    """Documents of about 290 tokens: 5 of them are 23 blocks of 64."""
    path.write_text("".join(json.dumps({"text": words(60, first + i)}) + "\n" for i in range(documents)))
    return path


def write_chats(path: Path, conversations: int = 24) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": words(3, i)}, {"role": "assistant", "content": words(4 + i % 5, -i)}]}
        for i in range(conversations)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_config(folder: Path, *, data: Path | None = None, apex: dict | None = None, **changes) -> RunConfig:
    """A run of 12 steps in 3 stages on a tiny model, all of it in `folder`. Its 23 blocks make 6 steps an epoch, of
    which the last is a smaller one."""
    folder.mkdir(exist_ok=True)
    settings = {
        "model": "tiny-llama",
        "data": (SourceConfig(str(data or write_texts(folder / "text.jsonl"))),),
        "eval_data": (SourceConfig(str(write_texts(folder / "held_out.jsonl", 1, first=100))),),
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "eval_max_blocks": 4,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        **changes,
    }
    stages = {"stages": 3, "k_heads": 0.25, "assess_samples": 8, **(apex or {})}
    return RunConfig(**settings, apex=ApexConfig(**stages))


def model_with_dropout(folder: Path) -> str:
    """tiny-llama that draws random numbers while it trains."""
    model = load_model("tiny-llama")
    model.config.attention_dropout = 0.1
    save_model(model, load_tokenizer("tiny-llama"), folder)
    return str(folder)


def read_metrics(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ONLY_TIMES} for line in lines]


def read_summary(folder: Path) -> dict:
    """summary.json without times."""
    summary = json.loads((folder / "summary.json").read_text())
    return {k: v for k, v in summary.items() if k not in ONLY_TIMES}


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Every weight, choice, count and loss of two finished runs is the same, bit for bit."""
    assert read_metrics(ours) == read_metrics(theirs)
    assert read_summary(ours) == read_summary(theirs)
    assert files_of(ours) == files_of(theirs)
    checked = 0
    for name in files_of(theirs):
        if name.endswith(".safetensors"):
            a, b = load_file(ours / name), load_file(theirs / name)
            assert a.keys() == b.keys()
            for key in b:
                assert torch.equal(a[key], b[key]), f"{name}: {key}"
            checked += 1
    assert checked >= 2
    assert (ours / "model/model.safetensors").read_bytes() == (theirs / "model/model.safetensors").read_bytes()


@contextlib.contextmanager
def moments(kill_at: int | str | None = None, count_to: Path | None = None):
    """For a process of its own, which kills itself (-9) at a moment: the `kill_at`-th, or the one when what has been
    written is to get the name `kill_at` (the end of its path). Else the number of moments is written to the file
    `count_to`.

    Moments: before every micro-batch, and whenever something is to be put on the disk for good or to get its name.
    """
    passed = 0

    def moment(function):
        def wrapped(*args, **kwargs):
            nonlocal passed
            passed += 1
            named = isinstance(args[-1], str | Path) and f"/{args[-1]}".endswith(f"/{kill_at}")
            if passed == kill_at or named:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    os.fsync = moment(lambda descriptor: None)  # it matters when the power fails, not when a process is killed
    os.rename, os.replace = moment(os.rename), moment(os.replace)
    run_trainer.RunTrainer.training_step = moment(run_trainer.RunTrainer.training_step)
    yield
    if count_to is not None:
        count_to.write_text(str(passed))


def run_quietly(
    config: RunConfig, resume: bool = False, kill_at: int | str | None = None, count_to: Path | None = None
) -> None:
    """train_one, with `moments`."""
    with moments(kill_at, count_to), open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        run.train_one(config, resume=resume)


def interrupted(config: RunConfig, step: int) -> None:
    """Train until `step` has begun, and no further."""
    inner = run.RunTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise _Stop
        return inner(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.RunTrainer, "training_step", training_step)
        with pytest.raises(_Stop):
            run.train_one(config)


class _Stop(Exception):
    pass


def control_of(folder: Path, elsewhere: Path) -> RunConfig:
    """The control of the finished run in `folder`, to be run once more `elsewhere`."""
    config = load_config(folder / "run" / "config.yaml")
    starts = [stage["step"] for stage in read_summary(folder / "run")["stages"]]
    return dataclasses.replace(control_config(config, starts), output_dir=str(elsewhere / "control"))
