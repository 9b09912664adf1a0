"""Pruning a model: the way in, and the loop of all methods that score components, say how many each layer keeps, remove
the rest, and repeat."""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftlm.errors import UserError
from graftlm.parts import count_parameters
from graftlm.pruning.ablation import ablation
from graftlm.pruning.base import Batch, Calibration, Measure, Pruned, PruneStep, PruningMethod
from graftlm.pruning.checks import check
from graftlm.pruning.layer_importance import LayerWatch
from graftlm.pruning.layer_sparsity import Adaptive, Allocate, Progress
from graftlm.pruning.methods import method
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.shapes import shapes_of
from graftlm.pruning.surgery import keep_components, prunable_blocks
from graftlm.pruning.targets import Target, apportioned, counts_of, find_target, published
from graftlm.pruning.ways import iterations_of, layers_differ


def prune(
    model: PreTrainedModel,
    settings: PruneSettings,
    calibration: Calibration,
    heard: Callable[[PruneStep], None] = lambda step: None,
) -> Pruned:
    """`model` pruned as `settings` say: a new model, in the same dtype and on the same device.

    Args:
        model: used up: its weights move into the new one.
        calibration: sequences to measure on, for each iteration (calibration.py).
        heard: told of every iteration when it is done.

    Raises UserError for what checks.check tells, and where a measure is no number.
    """
    check(model, settings)
    return method(settings.method)(model, settings, calibration, heard)


def ranked_by(measure: Measure) -> PruningMethod:
    """The way of pruning that removes what `measure` ranks lowest, in the steps and by layers as the settings say."""

    def prune(
        model: PreTrainedModel, settings: PruneSettings, calibration: Calibration, heard: Callable[[PruneStep], None]
    ) -> Pruned:
        allocate = Adaptive(settings) if layers_differ(settings) else None
        iterations = iterations_of(settings)
        return iterate(model, settings, calibration, heard, measure=measure, allocate=allocate, iterations=iterations)

    return prune


def iterate(
    model: PreTrainedModel,
    settings: PruneSettings,
    calibration: Calibration,
    heard: Callable[[PruneStep], None] = lambda step: None,
    *,
    measure: Measure,
    allocate: Allocate | None,
    iterations: int,
) -> Pruned:
    """The weakest components of every block removed in `iterations` steps, of which the last meets the target.

    What has gone never comes back. Each step measures the model that the last one left, on sequences of its own.

    Args:
        measure: importance of components; what has least goes first, ties by number.
        allocate: sparsities of the blocks (layer_sparsity.py); None: uniform, every layer keeps the same number.

    Raises UserError as `prune`.
    """
    begin = time.perf_counter()
    shapes = tuple(shapes_of(model))
    target = find_target(model, settings, uniform=allocate is None)
    original = count_parameters(model)
    kept = {name: torch.arange(n) for one in target.sizes for name, n in zip(one.names, one.counts, strict=True)}
    steps: list[PruneStep] = []
    for iteration in range(1, iterations + 1):
        started = time.perf_counter()
        blocks = prunable_blocks(model)
        if not blocks:  # coarse steps may take everything before the last iteration
            break
        progress = Progress(iteration, iterations, target.sparsity, blocks)
        scores, sparsities, importance = _measured(
            model, calibration(iteration - 1), progress, settings, measure, allocate
        )
        chosen = strongest(scores, _counts(model, settings, target, sparsities, iteration, iterations))
        model = keep_components(model, chosen)
        for name, ids in chosen.items():
            kept[name] = kept[name][ids]
        layer_importance = None if importance is None else tuple(importance.tolist())
        seconds = time.perf_counter() - started
        now = tuple(shapes_of(model))
        steps.append(PruneStep(iteration, count_parameters(model), now, layer_importance, seconds, iterations))
        heard(steps[-1])
    return Pruned(
        model=model,
        settings=settings,
        original_shapes=shapes,
        original_parameters=original,
        shapes=tuple(shapes_of(model)),
        parameters=count_parameters(model),
        steps=tuple(steps),
        kept=kept,
        seconds=time.perf_counter() - begin,
    )


def check_finite(scores: Mapping[str, Tensor]) -> None:
    """Raise UserError where a measure is NaN or Inf. `scores`: of what, in words -> any shape."""
    for name, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise UserError(f"prune: importance of {name} is NaN or Inf; the model is broken, or its dtype too narrow")


def _measured(
    model: PreTrainedModel,
    batches: list[Batch],
    progress: Progress,
    settings: PruneSettings,
    measure: Measure,
    allocate: Allocate | None,
) -> tuple[Mapping[str, Tensor], Mapping[str, float] | None, Tensor | None]:
    """Importance of components, sparsities of blocks (None: uniform), and importance of layers where it was asked for:
    the same passes show both."""
    watch = LayerWatch(model, settings.similarity)
    asked: list[Tensor] = []

    def of_layers() -> Tensor:
        if not watch.seen:
            watch.run(batches)
        asked.append(watch.importance())
        return asked[0]

    try:
        scores = measure(model, progress.blocks, batches)
        check_finite(scores)
        sparsities = None if allocate is None else allocate(progress, scores, of_layers)
    finally:
        watch.close()
    if settings.heads_by == "loss":  # passes that the watch must not see: they are of a model without something
        scores = {**scores, **ablation(model, [one for one in progress.blocks if one.kind == "heads"], batches[:1])}
        check_finite(scores)
    return scores, sparsities, asked[0] if asked else None


def _counts(
    model: nn.Module,
    settings: PruneSettings,
    target: Target,
    sparsities: Mapping[str, float] | None,
    iteration: int,
    iterations: int,
) -> dict[str, int]:
    """Components that every block keeps in this iteration."""
    counts: dict[str, int] = {}
    for kind, sizes in enumerate(target.sizes):
        now = counts_of(model, sizes)
        # A block without components is not allocated any: its sparsity is 1.
        own = None if sparsities is None else [sparsities.get(name, 1.0) for name in sizes.names]
        if settings.exact:
            found = apportioned(sizes, now, own, target.budget_at(kind, iteration, iterations))
        else:
            same = [target.sparsity * iteration / iterations] * len(now)
            found = published(sizes, now, same if own is None else own)
        counts |= dict(zip(sizes.names, found, strict=True))
    return counts


def strongest(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Ids of the components with the highest scores, of the blocks that lose any: int64 [count], ascending."""
    chosen = {}
    for name, values in scores.items():
        if counts[name] < len(values):
            order = values.cpu().argsort(descending=True, stable=True)
            chosen[name] = order[: counts[name]].sort().values
    return chosen
