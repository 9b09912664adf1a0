"""FSDP2 against one process, and what APEX adds to a step's communication: `python benchmarks/fsdp2.py`.

Runs on a CPU with gloo. Its last line is one JSON object:

fsdp2_relative_difference  weights after 20 steps on 2 and on 4 processes against one, float32, relative, by the norm
                           over all weights; the largest of a few tiny models (grouped-query attention with tied
                           embeddings; biases of mixed rows), with accumulation, clipping and two changes of the stage.
fsdp2_added_bytes_share    of the bytes that a step sends, those that APEX adds: every collective of one step of a model
                           with SmolLM2-135M's shapes and random weights is counted, with APEX and without.
"""

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.environment import describe_environment
from graftlm.sharding import shard_model, total_norm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from many_processes import relative_difference, run_of, saved_model

SMOLLM2 = {
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
LAYERS = 30


class Bytes(TorchDispatchMode):
    """Adds up the bytes of collectives, by the size of the whole: gathering or scattering it moves it past a process
    once (in a ring, but for that process's own share), reducing it to all twice."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        namespace, _, name = str(function).partition(".")
        if namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd") and "wait" not in name:
            sizes = [_bytes(arg) for arg in args]
            size = max([*sizes, _bytes(result) if namespace != "c10d" else 0])
            self.total += 2 * size if "reduce" in name and "scatter" not in name else size
            self.calls[name] = self.calls.get(name, 0) + 1
        return result


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _step_bytes(rank: int, world: int, port: int, layers: int, with_apex: bool, out: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=layers, **SMOLLM2))
    shard_model(model, torch.device("cpu"), mixed=with_apex)
    config = ApexConfig(stages=1, assessment="random")
    apex = Apex(model, config, total_steps=4) if with_apex else None
    operators = list(apex.container.parameters()) if apex is not None else []
    ours = {id(p) for p in operators}
    groups = [{"params": [p for p in model.parameters() if id(p) not in ours]}]
    optimizer = torch.optim.AdamW(groups + ([{"params": operators}] if operators else []), lr=1e-4)
    if apex is not None:
        apex.start(optimizer)
    ids = torch.randint(0, SMOLLM2["vocab_size"], (1, 32))
    for _ in range(2):  # the first one also sets up
        with Bytes() as counted:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            if apex is not None:
                apex.pull_back()
            total_norm([p.grad for p in model.parameters() if p.grad is not None])
            optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        out.put((counted.total, counted.calls, sum(p.numel() * p.element_size() for p in operators)))
    dist.barrier()
    dist.destroy_process_group()


def step_bytes(world: int, layers: int, with_apex: bool) -> tuple[int, dict[str, int], int]:
    """Bytes of a step of each process, calls by name, and bytes of the operators."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    running = [context.Process(target=_step_bytes, args=(r, world, port, layers, with_apex, out)) for r in range(world)]
    for process in running:
        process.start()
    result: tuple[int, dict[str, int], int] = out.get(timeout=500)
    for process in running:
        process.join()
    return result


def added_bytes(layers: int, world: int = 2) -> dict[str, Any]:
    plain, plain_calls, _ = step_bytes(world, layers, False)
    apex, apex_calls, operators = step_bytes(world, layers, True)
    return {
        "layers": layers,
        "processes": world,
        "plain_bytes": plain,
        "apex_bytes": apex,
        "operator_bytes": operators,
        "plain_calls": plain_calls,
        "apex_calls": apex_calls,
        "share": 1 - plain / apex,
    }


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def differences() -> dict[str, float]:
    found: dict[str, float] = {}
    with _folder() as folder:
        for family in ("tiny-llama", "qwen2"):
            model = family if family == "tiny-llama" else saved_model(folder / family, family)
            one = run_of(folder, 1, "none", name=f"{family}-1", model=model)
            for world in (2, 4):
                many = run_of(folder, world, "fsdp2", name=f"{family}-{world}", model=model)
                found[f"{family} on {world}"] = relative_difference(many, one)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers of SmolLM2-135M's shape (default: all 30)")
    parser.add_argument("--out", type=Path, help="write the result to this file, too")
    args = parser.parse_args()
    apart = differences()
    for name, value in apart.items():
        print(f"{name} processes: weights differ by {value:.2e} of their norm")
    counted = added_bytes(args.layers)
    print(f"a step sends {counted['plain_bytes']:,} bytes plainly and {counted['apex_bytes']:,} with APEX")
    result = {
        "fsdp2_relative_difference": max(apart.values()),
        "fsdp2_added_bytes_share": counted["share"],
        "differences": apart,
        "counted": counted,
        "environment": describe_environment(),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
