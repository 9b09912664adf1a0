"""What the methods that prune in one step, and not component by component, have in common."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
    that rank components within layers: iterations, heads_by, `exact: false`.
    """
    per_layer_config_class(model.config)  # said before anything is measured
    if settings.iterations not in (None, 1):
        raise UserError(f"prune: {settings.method} prunes in one step, not {settings.iterations}; leave iterations out")
    if settings.heads_by != "method":
        raise UserError(f"prune: {settings.method} does not rank heads within a layer; leave heads_by out")
    if not settings.exact:
        raise UserError(
            f"prune: {settings.method} always meets the sparsity; exact: false (--as-published) is for methods that "
            "say of every layer how many components it keeps"
        )
    return asked_parameters(model, settings)


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
