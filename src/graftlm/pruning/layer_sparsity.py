"""How much each layer loses: the adaptive rules (Adapt-Pruner, section 3.1.1, eq. 6), beside the uniform one.

A sparsity is the share of a layer's original components that has gone by the end of an iteration.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftlm.anatomy import Block
from graftlm.pruning.settings import PruneSettings, Rule

MOST = 0.99
"""Sparsity that the cumulative rule gives a layer at most (the authors' code)."""


@dataclass(frozen=True)
class Progress:
    """What is known when an iteration decides how much each layer keeps."""

    iteration: int
    """From 1."""
    iterations: int
    sparsity: float
    """Share of all components that has gone at the end of the last iteration."""
    blocks: Sequence[Block]
    """That still have components."""


Allocate = Callable[[Progress, Mapping[str, Tensor], Callable[[], Tensor]], Mapping[str, float]]
"""Given the progress, the components' importance (float32 [components] by block name) and a function that measures the
layers' (float64 [layers]): sparsities to reach in this iteration, by block name. Only their differences count where a
target is met exactly."""


def next_sparsity(
    rule: Rule,
    before: Tensor,
    importance: Tensor,
    *,
    sparsity: float,
    amplitude: float,
    iteration: int,
    iterations: int,
) -> Tensor:
    """Sparsity of every layer after iteration `iteration` (from 1): float64 [layers].

    cumulative: s <- clamp(s + S/T - A I, 0, 0.99), as the authors' code does. literal: clamp(S i/T - A I, 0, 0.99),
    as eq. 6 and algorithm 1 say.
    """
    if rule == "cumulative":
        wanted = before + sparsity / iterations - amplitude * importance
    else:
        wanted = sparsity * iteration / iterations - amplitude * importance
    return wanted.clamp(0, MOST)


class Adaptive:
    """Layers that matter less lose more; heads and channels of a layer the same share."""

    def __init__(self, settings: PruneSettings):
        self._settings = settings
        self._sparsity: Tensor | None = None

    def __call__(
        self, progress: Progress, scores: Mapping[str, Tensor], layer_importance: Callable[[], Tensor]
    ) -> dict[str, float]:
        settings = self._settings
        assert settings.amplitude is not None  # of a default or a preset
        importance = layer_importance()
        before = torch.zeros_like(importance) if self._sparsity is None else self._sparsity
        self._sparsity = next_sparsity(
            settings.rule,
            before,
            importance,
            sparsity=progress.sparsity,
            amplitude=settings.amplitude,
            iteration=progress.iteration,
            iterations=progress.iterations,
        )
        return {block.name: float(self._sparsity[block.layer]) for block in progress.blocks}
