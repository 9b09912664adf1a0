"""Small shrinks, for tests."""

import contextlib
import json
import os
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import ONLY_TIMES, moments, write_texts

from graftlm.pruning.shrink import run
from graftlm.pruning.shrink.config import Shrink, ShrinkConfig, make_shrink
from graftlm.training.config import SourceConfig

TIMES = ONLY_TIMES | {"prune_seconds", "total_seconds"}
ORIGINAL = 214_080
"""Parameters of tiny-llama."""


def tiny_shrink(folder: Path, *, train: dict | None = None, prune: dict | None = None, **changes) -> Shrink:
    """12 steps in 3 phases, to three quarters of tiny-llama, all of it in `folder`. 6 steps are an epoch, of which the
    last is a smaller one."""
    folder.mkdir(exist_ok=True)
    settings = {
        "model": "tiny-llama",
        "data": (SourceConfig(str(write_texts(folder / "text.jsonl"))),),
        "eval_data": (SourceConfig(str(write_texts(folder / "held_out.jsonl", 1, first=100))),),
        "output_dir": str(folder / "run"),
        "target_parameters": 160_000,
        "interleaves": 3,
        "max_steps": 12,
        **changes,
    }
    shared = {
        "cache_dir": str(folder / "cache"),
        "eval_max_blocks": 4,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "apex": {"stages": 1, "k_heads": 0.25, "assess_samples": 4},
        **(train or {}),
    }
    return make_shrink(ShrinkConfig(**settings), train=shared, prune={"iterations": 2, "samples": 4, **(prune or {})})


def shrink_quietly(task: Shrink, kill_at: int | str | None = None, count_to: Path | None = None) -> None:
    """run_shrink, for a process of its own (tiny_runs.moments)."""
    with moments(kill_at, count_to), open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        run.run_shrink(task, console=Console(file=null))


def quiet_shrink(task: Shrink) -> dict:
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        return run.run_shrink(task, console=Console(file=null))


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def read_lines(path: Path) -> list[dict]:
    return [without_times(json.loads(line)) for line in path.read_text().splitlines()]


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    a, b = load_file(ours), load_file(theirs)
    assert a.keys() == b.keys()
    for key in b:
        assert torch.equal(a[key], b[key]), key


def assert_same_shrink(ours: Path, theirs: Path) -> None:
    """Every weight, count and loss of two finished shrinks is the same, bit for bit."""
    assert_same_tensors(ours / "model/model.safetensors", theirs / "model/model.safetensors")
    summaries = [without_times(json.loads((folder / "summary.json").read_text())) for folder in (ours, theirs)]
    assert summaries[0] == summaries[1]
    assert read_lines(ours / "metrics.jsonl") == read_lines(theirs / "metrics.jsonl")
    files = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in (ours, theirs)]
    assert files[0] == files[1]
