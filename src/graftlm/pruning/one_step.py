"""What the methods that prune in one step, and not component by component, have in common."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor
from transformers import PreTrainedModel

from graftlm.parts import count_parameters
from graftlm.pruning.base import Pruned, PruneStep
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.shapes import LayerShape, shapes_of


def kept_as_published(count: int, settings: PruneSettings) -> int | None:
    """How many of `count` units (layers, dimensions) stay where the sparsity is a share of them, as their method was
    published: int(n (1 - s)), one at least. None where a number of parameters is to be met instead (`exact`)."""
    if settings.exact:
        return None
    return max(1, math.floor(count * (1 - Fraction(str(settings.sparsity)))))  # in decimals, as it was written


@dataclass(frozen=True)
class Before:
    """The model that a method is given, as its report needs it."""

    shapes: tuple[LayerShape, ...]
    parameters: int
    began: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Before":
        return cls(tuple(shapes_of(model)), count_parameters(model), time.perf_counter())


def pruned_from(
    before: Before,
    model: PreTrainedModel,
    settings: PruneSettings,
    kept: Mapping[str, Tensor],
    heard: Callable[[PruneStep], None],
    *,
    layer_importance: tuple[float, ...] | None = None,
    notes: tuple[str, ...] = (),
) -> Pruned:
    """The report of one step that ends now, which `heard` is told of."""
    shapes, parameters = tuple(shapes_of(model)), count_parameters(model)
    seconds = time.perf_counter() - before.began
    step = PruneStep(
        iteration=1, parameters=parameters, shapes=shapes, layer_importance=layer_importance, seconds=seconds
    )
    heard(step)
    return Pruned(
        model, settings, before.shapes, before.parameters, shapes, parameters, (step,), kept, seconds, notes
    )  # fmt: skip
