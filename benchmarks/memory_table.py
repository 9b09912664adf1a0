"""The table of docs/memory.md: what each GPU holds for Llamas of 1.1 B, 8 B and 70 B on 1, 8 and 16 GPUs.

    python benchmarks/memory_table.py

Prints Markdown, one row a model and way of training, and under it the settings. Each figure is that of `graftlm plan`
with the same settings and `--gpus N`; neither weights nor GPUs are needed, and it takes some minutes.
"""

import argparse
import datetime
import importlib.metadata
import json
import tempfile
from typing import Any

import torch
from transformers import LlamaConfig

from graftlm.configuring import load_config
from graftlm.errors import UserError
from graftlm.training.estimates import estimate
from graftlm.training.memory import fits_gpu
from graftlm.training.plan import model_for_shapes

# Hidden size, FFN channels, layers, heads, key-value heads, vocabulary.
SHAPES = {
    "1.1 B": (2048, 5632, 22, 32, 4, 32000),
    "8 B": (4096, 14336, 32, 32, 8, 128256),
    "70 B": (8192, 28672, 80, 64, 8, 128256),
}
COMMON = [
    "max_length=4096", "per_device_train_batch_size=1", "gradient_checkpointing=true", "optim=adamw_torch_fused",
    "max_steps=1000",
]  # fmt: skip
WAYS = {
    "full, fsdp2, float32 weights": ["distributed.strategy=fsdp2", "bf16=true"],
    "full, fsdp2, bfloat16 weights": ["distributed.strategy=fsdp2", "dtype=bfloat16"],
    "half (52%), fsdp2, bfloat16 weights": ["distributed.strategy=fsdp2", "dtype=bfloat16", "apex.trains=half"],
    "small (2.4%), ddp, bfloat16 weights": [
        "distributed.strategy=ddp", "dtype=bfloat16", "apex.trains=small", "apex.budget=0.024",
    ],
    "small (2.4%), fsdp2, bfloat16 weights": [
        "distributed.strategy=fsdp2", "dtype=bfloat16", "apex.trains=small", "apex.budget=0.024",
    ],
}  # fmt: skip
MEMORY = 80e9


def peaks(shape: tuple[int, ...], settings: list[str], gpus: list[int]) -> list[dict[str, Any] | None]:
    """The plan for each number of GPUs; None where the run is refused."""
    hidden, channels, layers, heads, groups, vocabulary = shape
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=channels, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        run = load_config(None, [f"model={folder}", "data=unread.txt", *COMMON, *settings])
        model = model_for_shapes(run)
        found: list[dict[str, Any] | None] = []
        for count in gpus:
            try:
                found.append(estimate(run, model, None, gpus=count))
            except UserError as error:
                print(f"{count} GPUs: {error}")
                found.append(None)
    return found


def cell(planned: dict[str, Any] | None) -> str:
    if planned is None:
        return "refused"
    peak = planned["estimated_peak_memory_bytes"]
    return f"**{peak / 1e9:.1f}**" if fits_gpu(peak, MEMORY) else f"{peak / 1e9:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 16], metavar="N", help="numbers of GPUs")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="which of the models")
    options = parser.parse_args()
    print("| model | way | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in options.gpus) + " | sent a step |")
    print("|---|---|" + "---|" * (len(options.gpus) + 1))
    table: dict[str, list[Any]] = {}
    for name in options.models:
        for way, settings in WAYS.items():
            planned = peaks(SHAPES[name], settings, options.gpus)
            sent = sum(planned[-1]["sent_bytes_per_step"].values()) if planned[-1] else 0
            print(f"| {name} | {way} | {' | '.join(map(cell, planned))} | {sent / 1e9:.3g} |", flush=True)
            table[f"{name}, {way}"] = [p and p["estimated_peak_memory_bytes"] for p in planned]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("graftlm", "torch", "transformers"))
    there = "with" if torch.cuda.is_available() else "without"
    print(f"\n{datetime.date.today()}, {versions}, on a machine {there} a GPU. Settings: `{' '.join(COMMON)}`, and for")
    print("\n".join(f"- {way}: `{' '.join(settings)}`" for way, settings in WAYS.items()))
    print(json.dumps(table))


if __name__ == "__main__":
    main()
