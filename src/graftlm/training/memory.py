"""How much memory a process of a run needs: bytes counted from shapes (costs.py), and of activations as measured
(probe.py), put together for the moments at which a step may be fullest.

Bytes that are alive: what an allocator keeps between pieces of memory is not in it.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from graftlm.apex import BATCH_BYTES
from graftlm.fused_loss import logits_at_once
from graftlm.training.config import RunConfig
from graftlm.training.costs import Held, gathered_share, reduced_share, weight_bytes
from graftlm.training.layout import Layout, run_device
from graftlm.training.probe import Probe

FLOAT32 = 4
LEFT_ALONE = 2 * 2**30
"""What CUDA and NCCL take of a GPU beside tensors, roughly; another tenth goes to gaps between tensors."""
PANELS_AT_ONCE = 8
"""Times the panels of N that pulling gradients back takes for a moment."""


def peak_memory(
    config: RunConfig, held: Held, probe: Probe, layout: Layout, tokens: int, process_bytes: int
) -> dict[str, Any]:
    """Bytes at the fullest moment of one process, the parts of it, and which moment. `tokens`: of a micro-batch."""
    shards, gpu = layout.shards, layout.device == "cuda"
    moments = _moments(config, held, probe, layout, tokens)
    at = max(moments, key=lambda name: sum(moments[name].values()))
    reduced = layout.strategy == "ddp" and layout.processes > 1
    parts: dict[str, float] = {
        "process": 0 if gpu else process_bytes,
        "weights": (held.weights - held.biases) / shards + held.biases,
        "operators": held.operators,
        "slices": held.slices / shards + held.slice_biases,
        "raw panels": held.raw / shards,
        "optimizer state": _state(held, probe, layout),
        "DDP's buckets": (held.gradients - held.pulled) if reduced else 0,
        **moments[at],
    }
    return {"peak": round(sum(parts.values())), "parts": {k: round(v) for k, v in parts.items() if round(v)}, "at": at}


def _state(held: Held, probe: Probe, layout: Layout) -> float:
    """Optimizer state of one process."""
    mean = probe.state_bytes / probe.trained  # of a size that the copy has none of
    sharded = sum(count * probe.state_of.get(size, mean) for size, count in held.trained_by_size.items())
    if not held.operator_parameters:
        return sharded / layout.shards
    size = held.operators // held.operator_parameters
    return sharded / layout.shards + held.operator_parameters * probe.state_of.get(size, mean)


def _moments(config: RunConfig, held: Held, probe: Probe, layout: Layout, tokens: int) -> dict[str, dict[str, float]]:
    """What is held beside weights, what APEX keeps, optimizer state and buckets, at each moment that may be fullest."""
    shards, gpu = layout.shards, layout.device == "cuda"
    fsdp2 = layout.strategy == "fsdp2"
    most = logits_at_once(layout.device) if probe.fused_loss else math.inf
    logits = min(most, tokens * held.vocabulary) * FLOAT32
    evaluated = min(most, config.per_device_eval_batch_size * config.max_length * held.vocabulary) * FLOAT32
    evaluated = evaluated if config.eval_data or config.eval_fraction else 0
    layers, rest = _activations(config, held, probe, tokens, fsdp2)
    gradients = (held.gradients - held.operators) / shards
    so_far = gradients if config.gradient_accumulation_steps > 1 else 0
    layer, outside, reduced = _gathered(config, held, layout)
    if layer:
        # Embeddings and LM head are one unit, gathered all along; gradients of theirs are whole until the end. A layer
        # is there up to three times: its weights, its gradient, and what is gathered of the next; and its gradient once
        # more as it is summed. Of slices, a layer's gradients are gathered, too.
        head = held.head * gathered_share(held, config.bf16)
        of_layer = held.layer_gradients * gathered_share(held, config.bf16) + 2 * held.layer_slices
        moments: dict[str, dict[str, float]] = {
            "the loss": {"gradients": so_far, "activations": layers + rest, "logits": 2 * logits,
                         "gathered": outside + layer},
            "the last layer's backward pass": {
                "gradients": so_far, "activations": layers, "gathered": outside + 2 * layer,
                "gradients not yet scattered": head + of_layer + reduced,
            },
            "the end of the backward pass": {
                "gradients": gradients,
                "activations": layers / held.layers,
                "gathered": outside,
                "gradients not yet scattered": held.outside_gradients * reduced_share(held, config.bf16),
            },
        }  # fmt: skip
    else:
        # The loss's backward pass holds two more tables of the logits' size: its own gradient and the logits'. A tied
        # embedding's two gradients are added up at the end.
        moments = {
            "the loss's backward pass": {"gradients": so_far, "activations": layers + rest, "logits": 2 * logits},
            "the end of the backward pass": {
                "gradients": gradients + held.embedding,
                "activations": (layers + rest) / held.layers,
            },
        }
    updated = gradients + held.operators
    # A GPU takes several matrices at once, and AdamW's foreach form (not fused) makes one more tensor of each gradient.
    panels = min(BATCH_BYTES, held.raw / shards) if gpu else held.panel / shards
    foreach = held.gradients / shards if gpu and config.optim == "adamw_torch" else 0
    working = 0 if "fused" in config.optim else max(foreach, 2 * held.largest / shards)
    moments["pulling gradients back"] = {"gradients": updated, "panels": PANELS_AT_ONCE * panels if held.raw else 0}
    moments["the optimizer step"] = {"gradients": updated, "optimizer": working, "the method": held.working}
    moments["evaluation"] = {"logits": 3 * evaluated, "gathered": outside + layer}
    if not gpu:  # copies for the disk are on the CPU, and so is the model as it is opened
        state = _state(held, probe, layout)
        # Each process writes its shards, and holds them twice.
        sharded = (held.weights + held.raw + held.slices) / shards + state
        moments["saving a checkpoint"] = {"copies": 2 * sharded if fsdp2 else state}
        # Before there is an optimizer; what is there from then on is in the sum already.
        opened = held.weights * (1 - 1 / shards) - state - held.operators - held.raw / shards
        moments["opening the model"] = {"weights to be sharded": max(0, opened)}
    return moments


def _activations(config: RunConfig, held: Held, probe: Probe, tokens: int, fsdp2: bool) -> tuple[float, float]:
    """What autograd keeps of a micro-batch, in the layers and outside."""
    passes = tokens / (probe.rows * probe.length)
    deep, rows = probe.depth, held.vocabulary / probe.vocabulary
    layers = passes * deep * probe.saved_layers
    if config.gradient_checkpointing:
        layers = passes * (held.layers * probe.hidden + probe.saved_layers / probe.layers)
    rest = passes * (probe.saved_rest + rows * probe.saved_logits) + rows * probe.copied_head
    return layers + (0 if fsdp2 else deep * probe.copied_layers), rest


def _gathered(config: RunConfig, held: Held, layout: Layout) -> tuple[float, float, float]:
    """Bytes of a layer and of everything outside the layers as fsdp2 gathers them, and of a layer's gradient as it is
    summed."""
    if layout.strategy != "fsdp2" or (layout.shards == 1 and not config.bf16):
        return 0, 0, 0
    share = gathered_share(held, config.bf16)
    return share * held.layer, share * held.outside, reduced_share(held, config.bf16) * held.layer_gradients


def peaks_with(
    config: RunConfig, held: Held, probe: Probe, layout: Layout, tokens: int, process_bytes: int
) -> dict[str, int]:
    """Peak bytes with one setting changed to spare memory, by that setting as a person writes it."""
    peaks = {}

    def add(
        setting: str, changed: RunConfig, *, state: float = 1.0, share: float = 1.0, spread: Layout = layout
    ) -> None:
        by_size = {size: value * state for size, value in probe.state_of.items()}
        smaller = replace(probe, state_bytes=round(probe.state_bytes * state), state_of=by_size)
        peaks[setting] = peak_memory(changed, held, smaller, spread, round(tokens * share), process_bytes)["peak"]

    rows = config.per_device_train_batch_size
    if rows > 1:
        half = replace(config, per_device_train_batch_size=rows // 2)
        more = replace(half, gradient_accumulation_steps=config.gradient_accumulation_steps * 2)
        setting = f"per_device_train_batch_size: {rows // 2}"
        add(
            f"{setting} (gradient_accumulation_steps: {more.gradient_accumulation_steps})", more, share=rows // 2 / rows
        )
    if not config.gradient_checkpointing:
        add("gradient_checkpointing: true", replace(config, gradient_checkpointing=True))
    if layout.device == "cuda" and config.optim == "adamw_torch":
        add("optim: adamw_torch_fused", replace(config, optim="adamw_torch_fused"))
    if config.optim.startswith("adamw_torch") and layout.strategy != "fsdp2":
        two_floats = 2 * FLOAT32 * probe.trained  # 8 bits each, and a float for every 256 of them
        eight_bits = min(1.0, 2 * (1 + FLOAT32 / 256) * probe.trained / two_floats)
        add("optim: adamw_8bit", replace(config, optim="adamw_8bit"), state=eight_bits)
    shardable = config.method in ("apex", "full")
    if layout.strategy == "ddp" and layout.processes > 1 and shardable and "8bit" not in config.optim:
        add("distributed.strategy: fsdp2", config, spread=replace(layout, strategy="fsdp2"))
    return peaks


def process_memory(model: PreTrainedModel) -> int:
    """Bytes of this process besides the model's weights: interpreter and libraries. On a GPU none of it counts."""
    if run_device(model).type != "cpu":
        return 0
    if next(model.parameters()).is_meta:
        return psutil.Process().memory_info().rss
    for parameter in model.parameters():
        parameter.detach().view(-1)[:: 4096 // parameter.element_size()].sum()  # weights may not be read from disk yet
    return max(0, psutil.Process().memory_info().rss - weight_bytes(model))


def fits_gpu(peak: int, memory: float) -> bool:
    """Whether a planned peak of tensors goes into a GPU's memory (bytes) with LEFT_ALONE and a tenth for gaps."""
    return 1.1 * peak + LEFT_ALONE <= memory


def machine_memory(device: torch.device) -> int:
    """Bytes that a run may use: of the GPU, else of the machine or of the container around it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total
