"""Sheared-LLaMA: masks learned under a constraint on the shape (Xia et al. 2024, arXiv 2310.06694, section 2.1).

Every key-value group and every channel has a hard concrete gate on what it gives to its output projection. Gates,
weights and Lagrange multipliers are trained together on the calibration data, min over gates and weights, max over
multipliers; the wanted sparsity grows linearly over the first fifth of the steps. Then the components with the highest
gates stay, as many as the target shape has, and what the gates have come to is multiplied into the output
projections. Every layer has the same target, so that the result has a uniform shape.

We differ from the authors' code (princeton-nlp/LLM-Shearing): groups are masked in place of query heads; layers and the
hidden size have no masks; gradients are not clipped (theirs to a norm of 1.0); training is 100 steps of the
calibration's sequences, where theirs is 3,200 steps of 131,072 tokens, and the gates' learning rate goes by the steps
(gate_rate: 0.5 for 100) in place of 1.0. `sheared_weight_rate: 0` trains the gates only; else the weights are float32
while they train, whatever the model's dtype.
Left out: dynamic batch loading, which mixes domains of training data; calibration has one.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftlm.anatomy import Block, linear
from graftlm.errors import UserError
from graftlm.importance import supervised, with_labels
from graftlm.parts import component_cost
from graftlm.pruning.base import Batch, Calibration, Pruned, PruneStep
from graftlm.pruning.hard_concrete import LARGEST, OPEN, Constraint, open_probability, sampled, settled
from graftlm.pruning.one_step import Before, pruned_from
from graftlm.pruning.prune import strongest
from graftlm.pruning.ranking import uniform_counts
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.surgery import keep_components, prunable_blocks
from graftlm.pruning.targets import find_target

GATE_TRAVEL = 50.0
"""How far a gate's log alpha can go in all. With 10 (0.1 for 100 steps), the expected sparsity of SmolLM2-135M's layers
missed a target of 0.2 by up to 0.5, with 50 by 0.09."""
WARM_UP_TARGET = 0.2
"""Share of the steps over which the wanted sparsity grows."""
WARM_UP_RATE = 0.1
"""Share of the steps over which the weights' learning rate grows; it then falls to a tenth along a cosine."""


@dataclass(frozen=True)
class Learned:
    """What training the masks gave."""

    scores: Mapping[str, Tensor]
    """By block, the log alpha of every component's gate: float32 [components]."""
    sparsity: Mapping[str, float]
    """By block, the expected sparsity that was reached."""
    losses: tuple[float, ...]
    """Language modelling loss of every step, gates included."""


def learn_masks(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    targets: Mapping[str, float],
    calibration: Calibration,
    settings: PruneSettings,
    heard: Callable[[int, Mapping[str, float]], None] = lambda step, sparsity: None,
) -> Learned:
    """Train gates (and the weights of `model`, in place) so that each block comes to its sparsity in `targets`.

    `heard` is told of every step, from 1, and the blocks' expected sparsities after it.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(settings.seed)
    gates = {b.name: nn.Parameter(torch.full((b.components,), OPEN, device=device)) for b in blocks}
    with torch.no_grad():
        for gate in gates.values():  # as theirs begin; the bound makes them equal, and their noise tells them apart
            gate.add_(torch.randn(gate.shape, generator=generator, device=device), alpha=1e-2).clamp_(-LARGEST, LARGEST)
    by_kind: dict[str, list[str]] = {}
    for block in blocks:
        by_kind.setdefault(block.kind, []).append(block.name)
    constraints = nn.ModuleDict({kind: Constraint() for kind in by_kind}).to(device)
    wanted = {kind: torch.tensor([targets[n] for n in names], device=device) for kind, names in by_kind.items()}
    steps = settings.sheared_steps
    optimizer, schedule = _optimizer(model, list(gates.values()), constraints, settings)
    drawn: dict[str, Tensor] = {}
    losses = []
    with _gated_training(model, blocks, drawn, settings):
        for step in range(steps):
            for name, gate in gates.items():
                drawn[name] = sampled(gate, torch.rand(gate.shape, generator=generator, device=device))
            share = min(1.0, (step + 1) / max(1, WARM_UP_TARGET * steps))
            penalty = torch.zeros((), device=device)
            for kind, constraint in constraints.items():
                expected = torch.stack([1 - open_probability(gates[name]).mean() for name in by_kind[kind]])
                penalty = penalty + constraint(expected, share * wanted[kind])
            optimizer.zero_grad()
            losses.append(_backward(model, calibration(step), penalty))
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"prune: sheared: the loss of step {step + 1} is NaN or Inf; the model is broken, its dtype "
                    "too narrow, or sheared_weight_rate or sheared_gate_rate too high"
                )
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for gate in gates.values():
                    gate.clamp_(-LARGEST, LARGEST)
            heard(step + 1, _expected(gates))
    return Learned({name: gate.detach().cpu() for name, gate in gates.items()}, _expected(gates), tuple(losses))


@contextmanager
def _gated_training(
    model: PreTrainedModel, blocks: Sequence[Block], drawn: Mapping[str, Tensor], settings: PruneSettings
) -> Iterator[None]:
    """Within it, `model` trains with each block's output multiplied by its gates in `drawn`, its own weights only where
    they have a learning rate; afterwards it is in the mode that it was in."""
    handles = [
        model.get_submodule(block.output.module).register_forward_pre_hook(partial(_gated, block, drawn))
        for block in blocks
    ]
    was_training = model.training
    wanted_gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.train()
    if not settings.sheared_weight_rate:
        model.requires_grad_(False)
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(settings.seed + 1)  # of dropout, whose generator is the global one; not the gates' draws
            yield
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
        model.zero_grad()
        for parameter, wanted_gradient in wanted_gradients:
            parameter.requires_grad_(wanted_gradient)


@contextmanager
def _weights_in_float32(model: nn.Module) -> Iterator[None]:
    """Within it, all parameters are float32: most updates are less than half a step of bfloat16, and would be lost."""
    dtypes = [(parameter, parameter.dtype) for parameter in model.parameters()]
    for parameter, _ in dtypes:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in dtypes:
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def _expected(gates: Mapping[str, Tensor]) -> dict[str, float]:
    """Sparsity of every block that its gates are expected to have when sampled."""
    means = torch.stack([1 - open_probability(gate).mean() for gate in gates.values()])  # fetched at once
    return dict(zip(gates, means.tolist(), strict=True))


@torch.no_grad()
def multiply_gates(model: nn.Module, blocks: Sequence[Block], scores: Mapping[str, Tensor]) -> None:
    """Multiply the columns of the output projections with the gates of their components, in place."""
    for block in blocks:
        weight = linear(model, block.output.module).weight
        weight.mul_(_by_column(block, settled(scores[block.name])).to(weight))


def _gated(block: Block, drawn: Mapping[str, Tensor], _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0] * _by_column(block, drawn[block.name]).to(args[0].dtype), *args[1:]


def _by_column(block: Block, by_component: Tensor) -> Tensor:
    """[components] -> [columns of the output projection]."""
    return by_component.repeat_interleave(block.slots * block.width)


def gate_rate(steps: int) -> float:
    """Learning rate of the gates where none is given: enough to go from open to closed and back several times (log
    alpha moves by the rate at every step of Adam, and begins at OPEN), and the paper's at most."""
    return min(1.0, GATE_TRAVEL / steps)


def _optimizer(
    model: nn.Module, gates: list[nn.Parameter], constraints: nn.Module, settings: PruneSettings
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    groups: list[dict[str, Any]] = [
        {"params": gates, "lr": settings.sheared_gate_rate or gate_rate(settings.sheared_steps)},
        {"params": list(constraints.parameters()), "lr": settings.sheared_multiplier_rate, "maximize": True},
    ]
    scales: list[Callable[[int], float]] = [lambda _: 1.0, lambda _: 1.0]
    if settings.sheared_weight_rate:
        groups.append({"params": list(model.parameters()), "lr": settings.sheared_weight_rate})
        scales.append(partial(_rate, steps=settings.sheared_steps))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, scales)


def _rate(step: int, steps: int) -> float:
    warm = WARM_UP_RATE * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))


def _backward(model: PreTrainedModel, batches: list[Batch], penalty: Tensor) -> float:
    """Leave the gradients of the mean loss over the tokens of all batches plus `penalty`, and return that loss; where
    none of a batch's tokens is supervised, all are."""
    total = torch.zeros_like(penalty)
    given = [with_labels({key: value.to(penalty.device) for key, value in batch.items()}) for batch in batches]
    tokens = sum(map(supervised, given))
    for number, inputs in enumerate(given, start=1):
        loss = model(**inputs, use_cache=False, num_items_in_batch=tokens).loss
        total += loss.detach()
        if number < len(given):
            loss.backward(retain_graph=True)  # the draws of the gates, which all batches share
        else:
            (loss + penalty).backward()
        del loss  # and all that led to it, before the next batch
    return float(total)


def prune(
    model: PreTrainedModel, settings: PruneSettings, calibration: Calibration, heard: Callable[[PruneStep], None]
) -> Pruned:
    """`heard` is told of every step of training too, with the parameters that the gates are expected to leave."""
    before = Before.of(model)
    blocks = prunable_blocks(model)
    target = find_target(model, settings, uniform=True)
    counts = uniform_counts(target, exact=settings.exact)
    targets = {block.name: 1 - counts[block.name] / block.components for block in blocks}
    sizes = {block.name: block.components * component_cost(model, block) for block in blocks}
    began = time.perf_counter()

    def trained(step: int, sparsity: Mapping[str, float]) -> None:
        nonlocal began
        seconds, began = time.perf_counter() - began, time.perf_counter()
        parameters = before.parameters - round(sum(sizes[name] * share for name, share in sparsity.items()))
        heard(PruneStep(step, parameters, before.shapes, None, seconds, settings.sheared_steps))

    with _weights_in_float32(model) if settings.sheared_weight_rate else nullcontext():
        learned = learn_masks(model, blocks, targets, calibration, settings, trained)
        multiply_gates(model, blocks, learned.scores)
    kept = {block.name: torch.arange(block.components) for block in blocks} | strongest(learned.scores, counts)
    missed = max(abs(learned.sparsity[name] - targets[name]) for name in targets)
    note = (
        f"sheared: {settings.sheared_steps} steps, loss {learned.losses[0]:.3f} -> {learned.losses[-1]:.3f}; the "
        f"gates' expected sparsity misses a layer's target by {missed:.3f} at most"
    )
    return pruned_from(before, keep_components(model, kept), settings, kept, heard, notes=(note,))
