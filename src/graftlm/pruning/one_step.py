"""What the methods that prune in one step, and not component by component, have in common."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor
from transformers import PreTrainedModel

from graftlm.errors import UserError
from graftlm.parts import count_parameters
from graftlm.pruning.base import Pruned, PruneStep
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.shapes import LayerShape, per_layer_config_class, shapes_of
from graftlm.pruning.targets import asked_parameters


def wanted_parameters(model: PreTrainedModel, settings: PruneSettings) -> int:
    """Parameters that the pruned model has at most, whatever it is pruned of. A sparsity asks for the same number as it
    does of methods that remove components: the model without that share of its heads' and channels' parameters.

    Raises UserError for a target above the model, for a family without a per-layer class, and for what is of methods
    that rank components within layers: iterations, heads_by.
    """
    per_layer_config_class(model.config)  # said before anything is measured
    if settings.iterations not in (None, 1):
        raise UserError(f"prune: {settings.method} prunes in one step, not {settings.iterations}; leave iterations out")
    if settings.heads_by != "method":
        given = "heads_by" if settings.preset is None else f"preset: {settings.preset} (or set heads_by: method)"
        raise UserError(f"prune: {settings.method} does not rank heads within a layer; leave out {given}")
    return asked_parameters(model, settings)


def kept_as_published(count: int, settings: PruneSettings) -> int | None:
    """How many of `count` units (layers, dimensions) stay where the sparsity is a share of them, as their method was
    published: int(n (1 - s)), one at least. None where a number of parameters is to be met instead (`exact`)."""
    if settings.exact:
        return None
    return max(1, math.floor(count * (1 - Fraction(str(settings.sparsity)))))  # in decimals, as it was written


def check_widths(model: PreTrainedModel, settings: PruneSettings) -> None:
    """Raise UserError where a method that leaves every layer's channels alone cannot give the widths asked for."""
    multiple = settings.width_multiple
    for i, shape in enumerate(shapes_of(model)):
        if shape.intermediate_size % multiple:
            raise UserError(
                f"prune: {settings.method} removes no channels, and the {shape.intermediate_size:,} of layer {i} are "
                f"no multiple of {multiple} (width_multiple); leave that out, or take another method"
            )


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
