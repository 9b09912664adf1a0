"""What the ways of pruning share: what they are given, and what they give back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from graftlm.anatomy import Block
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.shapes import LayerShape

TOKENS_A_PASS = 640
"""Of one batch (or one sequence, if longer): what a backward pass keeps grows with it, about 1.5 MB a token for a model
of 135 M parameters in float32."""

Batch = dict[str, Tensor]
Calibration = Callable[[int], list[Batch]]
"""Batches of calibration sequences for iteration i (from 0): input_ids [B, S] and what else the model takes, on the
CPU. The same i gives the same batches."""

Measure = Callable[[PreTrainedModel, Sequence[Block], list[Batch]], Mapping[str, Tensor]]
"""Importance of every component of every block, by block name: float32 [components], higher is kept longer."""


@dataclass(frozen=True)
class PruneStep:
    """What one iteration did."""

    iteration: int
    """From 1."""
    parameters: int
    """Of the model after it."""
    shapes: tuple[LayerShape, ...]
    """Of every layer after it."""
    layer_importance: tuple[float, ...] | None
    """Of every layer, before it (Adapt-Pruner eq. 5); None where the method has none."""
    seconds: float
    iterations: int = 1
    """How many there are in all."""


@dataclass(frozen=True)
class Pruned:
    """A pruned model and how it came about."""

    model: PreTrainedModel
    settings: PruneSettings
    original_shapes: tuple[LayerShape, ...]
    original_parameters: int
    shapes: tuple[LayerShape, ...]
    parameters: int
    steps: tuple[PruneStep, ...]
    kept: Mapping[str, Tensor]
    """By block name of the original model (Anatomy.blocks), ids of the components that stayed, int64 [n], ascending."""
    seconds: float
    notes: tuple[str, ...] = field(default=())
    """What a user should know."""


PruningMethod = Callable[[PreTrainedModel, PruneSettings, Calibration, Callable[[PruneStep], None]], Pruned]
"""One way of pruning (pruning/methods/NAME.py): model, settings, calibration, and a function that hears of every step.
The model that it is given is used up."""
