"""Estimates without training: what a run trains, computes, needs and takes, and afterwards how close they came.

Parameters and floating-point operations are counted (costs.py). Seconds, and the bytes that autograd saves, are those
of a scaled-down copy of the run that is timed for a few seconds (probe.py), scaled up.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from graftlm.anatomy import decoder_layers
from graftlm.apex import Apex
from graftlm.training import costs
from graftlm.training.config import RunConfig
from graftlm.training.probe import Probe, layers_to_copy, measure, run_device

FLOAT32 = 4


@dataclass
class Counted:
    """What is known of a run from shapes alone."""

    layers: int
    vocabulary: int
    total: int
    trainable: int
    operators: int
    effective_k: dict[str, float]
    notes: list[str]
    in_layers: costs.TokenFlops
    in_head: costs.TokenFlops
    probed: costs.TokenFlops
    """As `in_layers`, in rows as long as the probe's; filled in once they are known."""
    operator_flops: int
    weight_bytes: int
    """Operators and slices not among them."""
    added_bytes: int
    """Operators, slices, raw panels."""
    gradient_bytes: int
    largest_bytes: int
    """The largest tensor that trains."""
    embedding_bytes: int
    """The embedding, if it trains."""
    starts: list[int | None]
    """Step at which each stage begins."""


def estimate(
    config: RunConfig, model: PreTrainedModel, blocks: int | None, *, tokens: int | None = None
) -> dict[str, Any]:
    """Estimate a run of `config` on `model` (which is left as it was) in a few seconds.

    `blocks`, `tokens`: sequences and tokens of an epoch; None where they are not known. Returns JSON values; seconds
    are those of training as summary.json counts them (evaluation apart). Raises UserError for what `train` refuses.
    """
    length = config.max_length
    if tokens and blocks and not config.packing:
        length = max(1, round(tokens / blocks))
    rows = config.per_device_train_batch_size
    epoch_steps = steps_per_epoch(config, blocks)
    steps = _steps(config, epoch_steps)
    per_step = rows * config.gradient_accumulation_steps * _processes()
    process_bytes = _process_bytes(model)
    copied = layers_to_copy(model)
    with _apex_on(config, model, steps) as apex:
        counted = _count(config, model, apex, length, epoch_steps, per_step * length)
        trained = costs.trained_in_layers(apex, copied) if apex is not None else 0
    probe = measure(config, model, rows=rows, length=length, layers=copied, trained=trained)
    if probe.length < length:
        with _apex_on(config, model, steps) as apex:
            counted.probed = costs.token_flops(model, apex, probe.length)[0]
    memory = _memory(config, counted, probe, rows * length, process_bytes)
    flops = _flops(config, counted, per_step * length)
    return {
        "steps": steps,
        "tokens_per_step": per_step * length,
        "total_parameters": counted.total,
        "trainable_parameters": counted.trainable,
        "trainable_fraction": counted.trainable / counted.total,
        "operator_parameters": counted.operators,
        "effective_k": counted.effective_k,
        "stage_starts": counted.starts,
        "flops_per_step": sum(v for k, v in flops.items() if k != "recomputed"),
        "flops": flops,
        "flops_formula": costs.FORMULA if counted.trainable >= counted.total else costs.FORMULA_PARTLY,
        **_seconds(config, counted, probe, rows * length, steps, blocks),
        "estimated_peak_memory_bytes": memory["peak"],
        "memory": memory["parts"],
        "memory_peak_at": memory["at"],
        "measured_on": (
            f"{probe.layers} of {counted.layers} layers, {probe.vocabulary:,} of {counted.vocabulary:,} rows of the LM "
            f"head, {probe.rows} x {probe.length} tokens, whole steps on {run_device(model).type}, the fastest of a few"
        ),
        "notes": counted.notes,
    }


def compare_plan(planned: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """`planned` and how close it came: estimated / real, of the seconds of training and of peak memory."""
    ratios = {}
    for name, real in (("seconds", "seconds"), ("peak_memory", "peak_memory_bytes")):
        guess = planned.get(f"estimated_{real}")
        if guess and summary.get(real):
            ratios[f"{name}_ratio"] = round(guess / summary[real], 3)
    return planned | ratios


# -- how long ---------------------------------------------------------------------------------------------------------


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def steps_per_epoch(config: RunConfig, blocks: int | None) -> int | None:
    """Optimizer steps of a pass over `blocks` sequences, the last one partial, as Trainer counts them."""
    if blocks is None:
        return None
    batches = math.ceil(blocks / (config.per_device_train_batch_size * _processes()))
    return max(1, math.ceil(batches / config.gradient_accumulation_steps))


def _steps(config: RunConfig, epoch_steps: int | None) -> int | None:
    if config.max_steps > 0:
        return config.max_steps
    return None if epoch_steps is None else math.ceil(config.num_train_epochs * epoch_steps)


def evaluations(config: RunConfig, steps: int) -> int:
    """How often the held-out loss is taken: at the start, at the end, around fusions, and in between."""
    stages = config.apex.stages if config.method == "apex" else 1
    around = 1 + (2 * stages if config.method == "apex" else 1)
    periodic = {s for s in config.stage_starts[1:] if s < steps}
    if config.eval_steps:
        periodic |= set(range(config.eval_steps, steps, config.eval_steps))
    return around + len(periodic)


def _seconds(
    config: RunConfig, counted: Counted, probe: Probe, tokens: int, steps: int | None, blocks: int | None
) -> dict[str, Any]:
    """`tokens`: of a micro-batch. Scaling: layers by number and operations, the LM head by rows, updates by parameters.

    Not in it: reading the data, logging, and whatever else runs on the machine by then.
    """
    passes = tokens / (probe.rows * probe.length)
    deep = passes * counted.layers / probe.layers * counted.in_layers.total / counted.probed.total
    head = passes * counted.vocabulary / probe.vocabulary
    forward = deep * probe.forward_layers + head * probe.forward_rest
    backward = deep * probe.backward_layers + head * probe.backward_rest
    if config.gradient_checkpointing:
        backward += deep * probe.forward_layers
    update = probe.update * counted.trainable / probe.trained + probe.expansion * counted.layers / probe.layers
    step = config.gradient_accumulation_steps * (forward + backward) + update
    sequence = forward / config.per_device_train_batch_size
    samples = min(config.apex.assess_samples, blocks or config.apex.assess_samples)
    assesses = config.method == "apex" and config.apex.assessment != "random"
    assessment = samples * sequence if assesses else 0.0
    stages = len(counted.starts) * probe.stage * counted.layers / probe.layers
    evaluated = config.eval_max_blocks if config.eval_data or config.eval_fraction else 0
    evaluation = None if steps is None else evaluations(config, steps) * evaluated * sequence
    # The distributions of activations before and after; an assessment before training gives the first one for nothing.
    watching = (1 if assesses else 2) * samples * sequence
    total = None if steps is None else steps * step + assessment + stages
    return {
        "estimated_seconds": None if total is None else round(total, 3),
        "estimated_step_seconds": round(step, 4),
        "estimated_assessment_seconds": round(assessment, 3),
        "estimated_evaluation_seconds": None if evaluation is None else round(evaluation, 3),
        "estimated_wall_seconds": (
            None if total is None or evaluation is None else round(total + evaluation + watching, 3)
        ),
    }


# -- how much ---------------------------------------------------------------------------------------------------------


@contextmanager
def _apex_on(config: RunConfig, model: PreTrainedModel, steps: int | None) -> Iterator[Apex | None]:
    """The run's own Apex on `model`, to be asked for its numbers; taken off again."""
    if config.method != "apex":
        yield None
        return
    # An unknown number of steps lays out no stages; any number will do for everything else.
    known = steps or config.apex.stages
    apex = Apex(model, config.apex, total_steps=known, total_epochs=config.num_train_epochs)
    try:
        yield apex
    finally:
        apex.finish()


def _count(
    config: RunConfig,
    model: PreTrainedModel,
    apex: Apex | None,
    length: int,
    epoch_steps: int | None,
    tokens_per_step: int,
) -> Counted:
    in_layers, in_head = costs.token_flops(model, apex, length)
    own = {n: p for n, p in model.named_parameters() if not n.startswith("apex.")}
    trained = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
    embedding: Any = model.get_input_embeddings()
    weights = sum(p.numel() * p.element_size() for p in own.values())
    notes = list(apex.notes) if apex is not None else []
    if any(p.dim() == 3 for p in own.values()):
        notes.append("weights outside nn.Linear (stacked experts) are not in the FLOPs")
    return Counted(
        layers=len(decoder_layers(model)[1]),
        vocabulary=int(embedding.weight.shape[0]),
        total=sum(p.numel() for p in own.values()),
        trainable=apex.budget.trainable if apex else sum(p.numel() for p in own.values() if p.requires_grad),
        operators=apex.operator_parameters if apex else 0,
        effective_k=apex.effective_k if apex else {},
        notes=notes,
        in_layers=in_layers,
        in_head=in_head,
        probed=in_layers,
        operator_flops=costs.step_flops(apex) if apex else 0,
        weight_bytes=weights,
        added_bytes=costs.weight_bytes(model) - weights + (costs.raw_bytes(apex) if apex else 0),
        gradient_bytes=sum(trained),
        largest_bytes=max(trained, default=0),
        embedding_bytes=embedding.weight.nbytes if embedding.weight.requires_grad else 0,
        starts=_stage_starts(apex, epoch_steps, tokens_per_step) if apex else [],
    )


def _stage_starts(apex: Apex, epoch_steps: int | None, tokens_per_step: int) -> list[int | None]:
    length, by = apex.clock.length, apex.config.stage_by
    if length is None or apex.config.stages == 1:
        return [0]
    unit = {"steps": 1.0, "tokens": 1 / tokens_per_step, "epochs": epoch_steps}[by]
    rounded = round if by == "steps" else math.ceil
    return [None if unit is None else rounded(stage * length * unit) for stage in range(apex.config.stages)]


def _flops(config: RunConfig, counted: Counted, tokens: int) -> dict[str, float]:
    """Of one optimizer step; recomputation apart, since it is no work that the model needs (MFU leaves it out)."""
    return {
        "forward": tokens * (counted.in_layers.forward + counted.in_head.forward),
        "backward": tokens * (counted.in_layers.backward + counted.in_head.backward),
        "operators": counted.operator_flops,
        "recomputed": tokens * counted.in_layers.forward if config.gradient_checkpointing else 0,
    }


def _memory(config: RunConfig, counted: Counted, probe: Probe, tokens: int, process_bytes: int) -> dict[str, Any]:
    """Bytes at the fullest moment, and the parts of it. `tokens`: of a micro-batch.

    Bytes that are alive: what malloc keeps between pieces of memory (on a CPU some tenths of the activations, less with
    a small MALLOC_MMAP_THRESHOLD_) is not in it.
    """
    passes = tokens / (probe.rows * probe.length)
    rows = counted.vocabulary / probe.vocabulary
    deep = counted.layers / probe.layers
    logits = tokens * counted.vocabulary * FLOAT32
    layers = passes * deep * probe.saved_layers
    if config.gradient_checkpointing:
        layers = passes * (counted.layers * probe.hidden + probe.saved_layers / probe.layers)
    copies = deep * probe.copied_layers + rows * probe.copied_head
    saved = layers + passes * (probe.saved_rest + rows * probe.saved_logits) + copies
    state = probe.state_bytes * counted.trainable / probe.trained
    held = counted.gradient_bytes if config.gradient_accumulation_steps > 1 else 0
    saves = config.save_steps or (config.method == "apex" and config.apex.stages > 1)
    evaluated = config.per_device_eval_batch_size * config.max_length * counted.vocabulary * FLOAT32
    evaluated = evaluated if config.eval_data or config.eval_fraction else 0
    # Besides weights and optimizer state. The loss's backward pass holds two more tables of the logits' size: its own
    # gradient and the logits'. A tied embedding's two gradients are added up at the end.
    moments: dict[str, dict[str, float]] = {
        "the loss's backward pass": {"gradients": held, "activations": saved, "logits": 2 * logits},
        "the end of the backward pass": {
            "gradients": counted.gradient_bytes + counted.embedding_bytes,
            "activations": saved / counted.layers,
        },
        "the optimizer step": {"gradients": counted.gradient_bytes, "optimizer": 2 * counted.largest_bytes},
        "evaluation": {"logits": 3 * evaluated},
        "saving a checkpoint": {"copies": state if saves else 0},
    }
    at = max(moments, key=lambda name: sum(moments[name].values()))
    parts: dict[str, float] = {
        "process": process_bytes,
        "weights": counted.weight_bytes,
        "operators, slices, raw panels": counted.added_bytes,
        "optimizer state": state,
        **moments[at],
    }
    return {"peak": round(sum(parts.values())), "parts": {k: round(v) for k, v in parts.items() if v}, "at": at}


def _process_bytes(model: PreTrainedModel) -> int:
    """Memory of this process besides the model's weights: interpreter and libraries. On a GPU none of it counts."""
    if run_device(model).type != "cpu":
        return 0
    if next(model.parameters()).is_meta:
        return psutil.Process().memory_info().rss
    for parameter in model.parameters():
        parameter.detach().view(-1)[:: 4096 // parameter.element_size()].sum()  # weights may not be read from disk yet
    return max(0, psutil.Process().memory_info().rss - costs.weight_bytes(model))


def machine_memory(device: torch.device) -> int:
    """Bytes that a run may use: of the GPU, else of the machine or of the container around it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total
