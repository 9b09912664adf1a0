"""Dynamic batch loading: sources that are further above the loss they should come to are seen more.

Source: Xia et al., "Sheared LLaMA: Accelerating Language Model Pre-training via Structured Pruning", arXiv 2310.06694,
section 2.2 and algorithm 1. Every m steps the loss of each source is measured on held-out text, and its weight becomes
w exp(max(loss - reference, 0)), scaled to a sum of one. From its published code, which has it from DoReMi (Xie et al.,
arXiv 2305.10429): a share of 1e-4 is divided equally, so that no source is ever lost. (The code leaves out the max.)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from graftlm.training.config import DynamicLoadingConfig
from graftlm.training.data.blocks import BlockDataset
from graftlm.training.data.dynamic import DynamicBlocks

SMOOTHING = 1e-4
"""Share of the weights that all sources have equally."""


def updated_weights(weights: Sequence[float], losses: Sequence[float], references: Sequence[float]) -> list[float]:
    """The next weights, of which the sum is one. losses, references: nats per token."""
    gaps = [max(loss - reference, 0.0) for loss, reference in zip(losses, references, strict=True)]
    top = max(gaps)  # so that no exponential overflows
    grown = [weight * math.exp(gap - top) for weight, gap in zip(weights, gaps, strict=True)]
    total = sum(grown)
    return [(1 - SMOOTHING) * one / total + SMOOTHING / len(grown) for one in grown]


class DynamicLoading:
    """The weights of a run's sources, updated between its steps."""

    def __init__(self, settings: DynamicLoadingConfig, data: DynamicBlocks, loss_on: Callable[[BlockDataset], float]):
        """loss_on: mean held-out loss of the model as it is, nats per token."""
        self._settings, self._data, self._loss_on = settings, data, loss_on
        self._references = list(settings.reference_losses)

    def losses(self) -> list[float]:
        """Of every source, now."""
        return [self._loss_on(one) for one in self._data.held_out]

    def begin(self) -> None:
        """Before the first step: what the losses are compared with, where that was not given."""
        self._references = self._references or self.losses()

    def after_step(self, step: int, sequences: int) -> dict[str, Any] | None:
        """Update the weights if it is time, after optimizer step `step` (from 1) of so many sequences each; returns
        what to write down.

        They hold from the step after the next one: the loader has a batch of the next in its hands already, and what
        a step sees must not depend on how far it reads ahead.
        """
        if step % self._settings.every:
            return None
        losses = self.losses()
        weights = updated_weights(self._data.weights, losses, self._references)
        self._data.begin_window((step + 1) * sequences, weights)
        return {"weights": weights, "losses": losses, "references": self._references}

    def state_dict(self) -> dict[str, Any]:
        return {"references": self._references, "windows": self._data.windows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._references = list(state["references"])
        self._data.set_windows([(start, tuple(weights)) for start, weights in state["windows"]])
