"""Estimates without training: what a run trains, computes, needs and takes, and afterwards how close they came.

Parameters and floating-point operations are counted (costs.py). Seconds, and the bytes that autograd saves, are those
of a scaled-down copy of the run that is timed for a few seconds (probe.py), scaled up.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from graftlm.apex import Apex
from graftlm.reporting.figures import size
from graftlm.training import costs
from graftlm.training.config import RunConfig
from graftlm.training.layout import Layout, layout_of, run_device
from graftlm.training.memory import peak_memory, peaks_with, process_memory
from graftlm.training.method_costs import Prepared, prepared
from graftlm.training.probe import Probe, measure
from graftlm.training.scaled_copy import layers_copied, layers_to_copy

SECONDS = (
    "estimated_seconds",
    "estimated_step_seconds",
    "estimated_assessment_seconds",
    "estimated_evaluation_seconds",
    "estimated_wall_seconds",
)
"""What an estimate says of time."""


@dataclass
class Counted:
    """What is known of a run from shapes alone."""

    total: int
    trainable: int
    """At any one time; `held` counts all that trains at some time."""
    held: costs.Held
    effective_k: dict[str, float]
    notes: list[str]
    in_layers: costs.TokenFlops
    in_head: costs.TokenFlops
    probed: costs.TokenFlops
    """As `in_layers`, in rows as long as the probe's; filled in once they are known."""
    operator_flops: tuple[int, int]
    """Of an optimizer step and of a micro-batch, whatever its tokens; of APEX' operators, or of another method."""
    looks: tuple[int, bool] | None
    """Sequences that another method sees before training, and whether with gradients (Method.looks)."""
    starts: list[int | None]
    """Step at which each stage begins."""


def estimate(
    config: RunConfig,
    model: PreTrainedModel,
    blocks: int | None,
    *,
    evaluation_blocks: int | None = None,
    padded_length: float | None = None,
    longest: int | None = None,
    gpus: int | None = None,
) -> dict[str, Any]:
    """Estimate a run of `config` on `model` (which is left as it was) in a few seconds.

    `blocks`: sequences of an epoch; `evaluation_blocks`: sequences evaluated each time; `padded_length`, `longest`: of
    sequences that are not packed, tokens of a row as micro-batches are padded, on average and at most (None: full
    ones); None where they are not known. `gpus`: plan for so many, there or not; None: for this machine, and as many
    processes as a launcher started. Returns JSON values; memory and bytes sent are those of one process, seconds those
    of training as summary.json counts them (evaluation and communication apart), None where there is no GPU to measure
    a plan for GPUs on. Raises UserError for what `train` refuses.
    """
    layout = layout_of(config, model, gpus)
    length = fullest = config.max_length
    if padded_length and longest and not config.packing:
        length, fullest = max(1, round(padded_length)), longest
    rows = config.per_device_train_batch_size
    epoch_steps = steps_per_epoch(config, blocks, layout.processes)
    steps = total_steps(config, epoch_steps)
    per_step = config.sequences_per_step * layout.processes
    process_bytes = process_memory(model)
    copied = layers_to_copy(model)
    ready = prepared(config, model, steps)
    with _apex_on(config, model, steps) as apex:
        counted = _count(config, model, apex, ready, length, epoch_steps, per_step * length)
        trained = costs.trained_in_layers(apex, layers_copied(model, copied)) if apex is not None else 0
    given = config if ready is None else ready.config
    probe = measure(given, model, rows=rows, length=length, layers=copied, trained=trained, timed=not layout.assumed)
    if probe.length < length:
        with _apex_on(config, model, steps) as apex:
            counted.probed = _token_flops(model, apex, ready, probe.length)[0]
    held = counted.held
    memory = peak_memory(config, held, probe, layout, rows * fullest, process_bytes)
    flops = _flops(config, counted, per_step * length, layout)
    return {
        "layout": asdict(layout),
        "steps": steps,
        "steps_per_epoch": epoch_steps,
        "tokens_per_step": per_step * length,
        "total_parameters": counted.total,
        "trainable_parameters": counted.trainable,
        "trainable_fraction": counted.trainable / counted.total,
        "operator_parameters": held.operator_parameters,
        "effective_k": counted.effective_k,
        "stage_starts": counted.starts,
        "flops_per_step": sum(v for k, v in flops.items() if k != "recomputed"),
        "flops": flops,
        "flops_formula": costs.FORMULA if held.trainable >= counted.total else costs.FORMULA_PARTLY,
        **_seconds(config, counted, probe, layout, steps, blocks, evaluation_blocks, rows * length),
        "estimated_peak_memory_bytes": memory["peak"],
        "memory": memory["parts"],
        "memory_peak_at": memory["at"],
        "peak_memory_with": peaks_with(config, held, probe, layout, rows * fullest, process_bytes),
        "sent_bytes_per_step": costs.sent_bytes(
            held, layout, bf16=config.bf16, micro_batches=config.gradient_accumulation_steps
        ),
        "measured_on": _measured_on(held, probe, run_device(model).type),
        "notes": counted.notes,
    }


def _measured_on(held: costs.Held, probe: Probe, device: str) -> str:
    width = f" at 1/{probe.narrowing} of the width" if probe.narrowing > 1 else ""
    timed = ", whole steps, the fastest of a few" if probe.forward_layers else ""
    return (
        f"{probe.layers} of {held.layers} layers{width}, {probe.vocabulary:,} of {held.vocabulary:,} rows of the LM "
        f"head, {probe.rows} x {probe.length} tokens on {device}{timed}"
    )


def compare_plan(planned: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """`planned` and how close it came: estimated / real, of the seconds of training and of peak memory."""
    ratios = {}
    for name, real in (("seconds", "seconds"), ("peak_memory", "peak_memory_bytes")):
        guess = planned.get(f"estimated_{real}")
        if guess and summary.get(real):
            ratios[f"{name}_ratio"] = round(guess / summary[real], 3)
    return planned | ratios


# -- how long ---------------------------------------------------------------------------------------------------------


def steps_per_epoch(config: RunConfig, blocks: int | None, processes: int) -> int | None:
    """Optimizer steps of a pass over `blocks` sequences, the last one partial, as Trainer counts them."""
    if blocks is None:
        return None
    batches = math.ceil(blocks / (config.per_device_train_batch_size * processes))
    return max(1, math.ceil(batches / config.gradient_accumulation_steps))


def total_steps(config: RunConfig, epoch_steps: int | None) -> int | None:
    """Optimizer steps of the run, as Trainer counts them; None: it goes by epochs, and theirs are not known."""
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
    config: RunConfig,
    counted: Counted,
    probe: Probe,
    layout: Layout,
    steps: int | None,
    blocks: int | None,
    evaluation_blocks: int | None,
    tokens: int,
) -> dict[str, Any]:
    """`tokens`: of a micro-batch. Scaling: layers by number and operations, the LM head by rows, updates by parameters.

    Not in it: reading the data, communication, logging, and whatever else runs on the machine by then.
    """
    if layout.assumed:
        return dict.fromkeys(SECONDS)
    held = counted.held
    passes = tokens / (probe.rows * probe.length)
    deep = passes * probe.depth * counted.in_layers.total / counted.probed.total
    head = passes * held.vocabulary / probe.vocabulary
    forward = deep * probe.forward_layers + head * probe.forward_rest
    backward = deep * probe.backward_layers + head * probe.backward_rest
    if config.gradient_checkpointing:
        backward += deep * probe.forward_layers
    update = probe.update * held.trainable / probe.trained + probe.expansion * probe.depth
    step = config.gradient_accumulation_steps * (forward + backward) + update
    sequence = forward / config.per_device_train_batch_size
    samples = min(config.apex.assess_samples, blocks or config.apex.assess_samples)
    assesses = config.method == "apex" and config.apex.assessment in ("rank", "average")
    # Processes divide sequences that are only looked at between them.
    assessment = samples * sequence / layout.processes if assesses else 0.0
    if config.method == "apex" and config.apex.assessment == "gradient":
        assessment = 3 * samples * sequence / layout.processes
    if counted.looks is not None:
        seen, gradients = min(counted.looks[0], blocks or counted.looks[0]), counted.looks[1]
        # With the gradients of all weights, a backward pass is two forward passes.
        assessment += seen * sequence * (3 if gradients else 1) / layout.processes
    stages = len(counted.starts) * probe.stage * probe.depth
    evaluated = config.eval_max_blocks if config.eval_data or config.eval_fraction else 0
    if evaluation_blocks is not None:
        evaluated = min(evaluated, evaluation_blocks)
    evaluation = None if steps is None else evaluations(config, steps) * evaluated * sequence / layout.processes
    # The distributions of activations before and after; an assessment before training gives the first one for nothing.
    watching = (1 if assesses else 2) * samples * sequence / layout.processes
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
    ready: Prepared | None,
    length: int,
    epoch_steps: int | None,
    tokens_per_step: int,
) -> Counted:
    in_layers, in_head = _token_flops(model, apex, ready, length)
    own_flops = (costs.step_flops(apex) if apex else 0, costs.pass_flops(apex))
    if ready is not None:
        own_flops = ready.method.flops()
    held = costs.held_bytes(model if ready is None else ready.model, apex)
    if ready is not None:
        held.working = ready.method.working_bytes()
        held.weights += sum(b.nbytes for b in ready.model.buffers()) - sum(b.nbytes for b in model.buffers())
    own = {n: p for n, p in model.named_parameters() if not n.startswith("apex.")}
    notes = list(apex.notes) if apex is not None else []
    if config.distillation.teacher is not None:
        notes.append("the teacher is in none of these figures: its weights and forward passes come on top")
    if ready is not None:
        notes += ready.notes
        if ready.looks is None:
            notes.append(f"how long {config.method} looks at data before training is not in the time")
    if any(p.dim() == 3 for p in own.values()):
        notes.append("weights outside nn.Linear (stacked experts) are not in the FLOPs")
    return Counted(
        total=sum(p.numel() for p in own.values()),
        trainable=held.trainable if ready is None else ready.method.trainable,
        held=held,
        effective_k=apex.effective_k if apex else {},
        notes=notes,
        in_layers=in_layers,
        in_head=in_head,
        probed=in_layers,
        operator_flops=own_flops,
        looks=(0, False) if ready is None else ready.looks,
        starts=_stage_starts(apex, epoch_steps, tokens_per_step) if apex else [],
    )


def _token_flops(
    model: PreTrainedModel, apex: Apex | None, ready: Prepared | None, length: int
) -> tuple[costs.TokenFlops, costs.TokenFlops]:
    if ready is None:
        return costs.token_flops(model, apex, length)
    return costs.token_flops(ready.model, None, length, ready.flops)


def _stage_starts(apex: Apex, epoch_steps: int | None, tokens_per_step: int) -> list[int | None]:
    length, by = apex.clock.length, apex.config.stage_by
    if length is None or apex.config.stages == 1:
        return [0]
    unit = {"steps": 1.0, "tokens": 1 / tokens_per_step, "epochs": epoch_steps}[by]
    rounded = round if by == "steps" else math.ceil
    return [None if unit is None else rounded(stage * length * unit) for stage in range(apex.config.stages)]


def _flops(config: RunConfig, counted: Counted, tokens: int, layout: Layout) -> dict[str, float]:
    """Of one optimizer step of all processes; recomputation apart, since it is no work that the model needs (MFU leaves
    it out)."""
    step, a_pass = counted.operator_flops
    return {
        "forward": tokens * (counted.in_layers.forward + counted.in_head.forward),
        "backward": tokens * (counted.in_layers.backward + counted.in_head.backward),
        "operators": step * layout.processes / layout.shards  # shards divide it, ddp repeats it
        + a_pass * layout.processes * config.gradient_accumulation_steps,
        "recomputed": tokens * counted.in_layers.forward if config.gradient_checkpointing else 0,
    }


def remedies(planned: dict[str, Any] | None) -> str:
    """What to change where memory does not suffice, with the plan's numbers where there is one; to follow a clause."""
    general = (
        "lower per_device_train_batch_size (raise gradient_accumulation_steps instead), or set gradient_checkpointing"
    )
    if planned is None:
        return f"; {general}: true"
    peak = planned["estimated_peak_memory_bytes"]
    better = {k: v for k, v in sorted(planned["peak_memory_with"].items(), key=lambda item: item[1]) if v < peak}
    offers = ", ".join(f"about {size(value)} with {setting}" for setting, value in better.items())
    return f"; the plan expects {size(peak)} as it is" + (f", {offers}" if offers else f"; {general}: true")
