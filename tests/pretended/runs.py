"""What graftlm does, first on the CPU, then on the pretended GPU: a process of its own, for test_pretended_gpu.py.

    python runs.py LIBRARY FOLDER SCENARIO ...

writes FOLDER/found.json: for each scenario the numbers of both, and how many operations ran on the GPU. LIBRARY: what
gpu.cpp compiles to.
"""

import ctypes
import sys

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch, which looks for it once

import contextlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from pretended import gpu  # noqa: E402
from tiny_models import batches, tiny_model  # noqa: E402
from tiny_runs import tiny_config, words, write_texts  # noqa: E402
from tiny_shrinks import quiet_shrink, tiny_shrink  # noqa: E402

from graftlm.assess import assess  # noqa: E402
from graftlm.evaluation.run import run_evaluation  # noqa: E402
from graftlm.generation import generate_text  # noqa: E402
from graftlm.methods import METHODS  # noqa: E402
from graftlm.methods.adapter_settings import LoraSettings, ReloraSettings  # noqa: E402
from graftlm.methods.sparse_settings import LiftSettings, ReweightingSettings, S2ftSettings  # noqa: E402
from graftlm.models import load_model, load_tokenizer, to_gpu  # noqa: E402
from graftlm.pruning.prune import prune  # noqa: E402
from graftlm.pruning.run import run_prune  # noqa: E402
from graftlm.pruning.settings import PruneSettings  # noqa: E402
from graftlm.pruning.ways import WAYS  # noqa: E402
from graftlm.training.config import DistillationConfig  # noqa: E402
from graftlm.training.run import train  # noqa: E402
from graftlm.training.run_trainer import RunTrainer  # noqa: E402

Found = dict[str, float]


class Stopped(Exception):
    pass


def numbers(told: Any, name: str = "") -> Found:
    """Every number in a JSON value, by its path (of files, their names); times and sizes of memory left out."""
    if isinstance(told, dict):
        found: Found = {}
        for key, value in told.items():
            if not any(word in str(key) for word in ("seconds", "memory", "date")):
                found |= numbers(value, f"{name}.{str(key).rpartition('/')[2]}")
        return found
    if isinstance(told, list):
        return {k: v for i, value in enumerate(told) for k, v in numbers(value, f"{name}.{i}").items()}
    return {name: told} if isinstance(told, int | float) and not isinstance(told, bool) else {}


def losses(run: Path) -> Found:
    told = numbers(json.loads((run / "summary.json").read_text()))
    found = {key: value for key, value in told.items() if "loss" in key}
    assert found
    return found


def trained(folder: Path, apex: dict[str, Any] | None = None, **changes: Any) -> Found:
    config = tiny_config(folder, apex=apex, **{"max_steps": 6, **changes})
    train(config)
    return losses(folder / "run")


def resumed(folder: Path, **changes: Any) -> Found:
    """Stopped in the fifth step, two after a checkpoint."""
    settings: dict[str, Any] = {"max_steps": 6, "save_steps": 2, **changes}
    step, done = RunTrainer.training_step, 0

    def until_the_fifth(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal done
        done += 1
        if done > 9:  # two micro-batches a step
            raise Stopped
        return step(*args, **kwargs)

    with mock.patch.object(RunTrainer, "training_step", until_the_fifth), contextlib.suppress(Stopped):
        train(tiny_config(folder, **settings))
    train(tiny_config(folder, **settings), resume=True)
    return losses(folder / "run")


def pruned(folder: Path, method: str = "adapt", family: str = "llama", **given: Any) -> Found:
    iterations = 2 if WAYS[method].iterations else None
    settings = PruneSettings(
        **{"method": method, "sparsity": 0.3, "iterations": iterations, "sheared_steps": 4, **given}
    )
    model = tiny_model(family, num_hidden_layers=4)
    to_gpu(model)
    done = prune(model, settings, lambda i: batches(2, rows=4, seed=i + 1))
    where = {tensor.device for tensor in (*done.model.parameters(), *done.model.buffers())}
    assert len(where) == 1, where
    weights = (float(parameter.detach().double().norm()) for parameter in done.model.parameters())
    return {"parameters": done.parameters, **{f"weight {i}": norm for i, norm in enumerate(weights)}}


def pruned_by_command(folder: Path) -> Found:
    settings = PruneSettings(sparsity=0.2, iterations=2, samples=4, sample_length=32, heads_by="loss")
    run_prune("tiny-llama", settings, [str(write_texts(folder / "text.jsonl"))], folder / "out", progress=False)
    told = json.loads((folder / "out" / "pruning.json").read_text())
    return {key: told[key] for key in ("parameters", "held_out_loss_before", "held_out_loss")}


def shrunk(folder: Path, **changes: Any) -> Found:
    quiet_shrink(tiny_shrink(folder, max_steps=4, interleaves=2, **changes))
    return losses(folder / "run")


def measured(folder: Path) -> Found:
    """Evaluation, generation, and what is looked at in a model."""
    rows = [{"question": f"{words(4, i)}?", "choices": ["cat", "a dog"], "answer": i % 2} for i in range(6)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text(words(120))
    told = run_evaluation(
        "tiny-llama",
        folder / "out.json",
        multiple_choice=[folder / "questions.jsonl"],
        perplexity=[folder / "text.txt"],
        batch_size=2,
        progress=False,
    )
    model, tokenizer = load_model("tiny-llama"), load_tokenizer("tiny-llama")
    to_gpu(model)
    text = generate_text(model, tokenizer, "the cat", max_new_tokens=8, chat=False, stream=False)
    data = str(write_texts(folder / "text.jsonl"))
    assess("tiny-llama", data, folder / "looked", samples=4, max_length=64, mask=0.25, prune_sensitivity=0.5)
    looked = json.loads((folder / "looked" / "assessment.json").read_text())
    return numbers({"eval": told["results"], "generated": len(text), "assessed": looked})


# -- what there is, by name -------------------------------------------------------------------------------------------

LORA = {"lora": LoraSettings(rank=4), "relora": ReloraSettings(interval=3, warmup=1)}
FUSED = "adamw_torch_fused"
SCENARIOS: dict[str, Callable[[Path], Found]] = {
    "apex": trained,
    "resumed": resumed,
    "measured": measured,
    "pruned by command": pruned_by_command,
    "shrunk with apex": partial(shrunk, recovery="apex"),
    "shrunk": shrunk,
    # whose state has its count of steps on the GPU, too
    "fused resumed": partial(resumed, optim=FUSED),
    "fused shrunk": partial(shrunk, keep_moments=True, train={"optim": FUSED}),
    "fused apex start=split": partial(trained, optim=FUSED, apex={"start": "split", "split_tolerance": 5.0}),
    "fused relora": partial(trained, method="relora", optim=FUSED, **LORA),
    "fused lift": partial(trained, method="lift", optim=FUSED, lift=LiftSettings(rank=4, interval=2)),
    "full": partial(trained, method="full"),
    "bf16": partial(trained, bf16=True, optim=FUSED),
    "bfloat16": partial(trained, dtype="bfloat16", apex={"trains": "half"}),
    "checkpointing": partial(trained, gradient_checkpointing=True),
    "documents": partial(trained, document_boundaries=True),
    "distilled": partial(trained, method="full", distillation=DistillationConfig(teacher="tiny-llama", weight=0.5)),
    "adafactor": partial(trained, optim="adafactor"),
    "sgd": partial(trained, optim="sgd"),
    **{f"method {name}": partial(trained, method=name, **LORA) for name in METHODS},
    "s2ft, coupled": partial(
        trained, method="s2ft", s2ft=S2ftSettings(trains="coupled", choose_by="gradient", budget=0.3)
    ),
    **{
        f"reweighting {name}": partial(trained, method="full", reweighting=ReweightingSettings(strategy=name))
        for name in ("linupper", "quadratic", "extremes")
    },
    **{f"apex {key}={value}": partial(trained, apex={key: value}) for key, value in (
        ("assessment", "average"), ("assessment", "random"), ("assessment", "magnitude"), ("assessment", "gradient"),
        ("assess_per", "microbatch"), ("operator", "dense"), ("operator", "diagonal"), ("expand", False),
        ("share_operators", False), ("authors_diagonals", True), ("operator_learning_rate", "auto"),
        ("keep_operator_moments", True), ("trains", "half"), ("trains", "small"), ("activation_regularization", 1e-3),
        ("fused_gate", False),
    )},
    "apex start=split": partial(trained, apex={"start": "split", "split_tolerance": 5.0}),
    **{
        f"pruned {method} {family}": partial(pruned, method=method, family=family)
        for method in WAYS
        for family in ("llama", "qwen3", "phi3")
    },
    "pruned by loss": partial(pruned, heads_by="loss"),
    "pruned uniform": partial(pruned, uniform=True),
}  # fmt: skip


def mixed() -> bool:
    """Whether mixing the two is refused: else nothing here would show anything."""
    with gpu.pretended_gpu():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        moved = here.to("cuda") + there
        try:
            here + there
        except gpu.Mixed:
            return moved.device.type == "cuda" and moved.cpu().device.type == "cpu"
    return False


def main(folder: Path, names: list[str]) -> None:
    told: dict[str, Any] = {}
    assert mixed()
    for name in names:
        one = folder / name.replace(" ", "_")
        try:
            for where, manager in (("cpu", contextlib.nullcontext()), ("gpu", gpu.pretended_gpu())):
                before = gpu.operations
                (one / where).mkdir(parents=True)
                with manager, open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                    told.setdefault(name, {})[where] = SCENARIOS[name](one / where)
                told[name]["operations"] = gpu.operations - before
        except Exception:
            told[name] = {"error": traceback.format_exc()}
    (folder / "found.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[2]), sys.argv[3:] or list(SCENARIOS))
