"""What a model's shapes and the settings tell before anything is measured: whether a pruning can be done at all."""

from transformers import PreTrainedModel

from graftlm.errors import UserError
from graftlm.models import context_of, has_own_class, is_stock
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.shapes import per_layer_config_class, shapes_of
from graftlm.pruning.sliced_modeling import FAMILIES as SLICEABLE
from graftlm.pruning.targets import check_size
from graftlm.pruning.ways import WAYS


def check(model: PreTrainedModel, settings: PruneSettings) -> None:
    """Raise UserError for a family that the method cannot prune, settings that the model or the method cannot follow,
    and a size that it cannot come to. Needs no weights."""
    _check_code(model)
    if settings.method == "slicegpt":
        _check_sliceable(model)
    per_layer_config_class(model.config)  # a family that has none says so
    context = context_of(model)
    if context is not None and settings.sample_length > context:
        raise UserError(
            f"prune: sample_length {settings.sample_length} is above the model's context of {context} tokens; give at "
            "most that"
        )
    if WAYS[settings.method].iterations is None:
        _check_one_step(settings)
    if settings.method in ("sheared", "slicegpt") and settings.uniform is False:
        alike = "makes all layers alike, as its paper does" if settings.method == "sheared" else "takes the same of all"
        raise UserError(f"prune: {settings.method} {alike}; leave uniform out")
    if not WAYS[settings.method].components:
        _check_widths(model, settings)
    check_size(model, settings)


def _check_code(model: PreTrainedModel) -> None:
    """What comes out is built from transformers' classes and this package's."""
    if not (is_stock(model) or has_own_class(model)):
        raise UserError(
            f"prune: {type(model).__name__} is a class with code of its own ({type(model).__module__}), which a pruned "
            "model would not have; prune a model of transformers' own classes"
        )


def _check_sliceable(model: PreTrainedModel) -> None:
    """Norms must commute with a rotation of the residual stream."""
    family = str(model.config.model_type)
    if family not in SLICEABLE:
        raise UserError(
            f"prune: slicegpt cannot slice model type {family}: it needs layers of the stock shape, and norms before "
            f"attention and FFN that a rotation passes through; those of {', '.join(SLICEABLE)} do"
        )


def _check_one_step(settings: PruneSettings) -> None:
    """What is of methods that rank components within layers, again and again."""
    if settings.iterations not in (None, 1):
        raise UserError(f"prune: {settings.method} prunes in one step, not {settings.iterations}; leave iterations out")
    if settings.heads_by != "method":
        given = "heads_by" if settings.preset is None else f"preset: {settings.preset} (or set heads_by: method)"
        raise UserError(f"prune: {settings.method} does not rank heads within a layer; leave out {given}")


def _check_widths(model: PreTrainedModel, settings: PruneSettings) -> None:
    """A method that leaves every layer's channels alone cannot give all widths."""
    multiple = settings.width_multiple
    for i, shape in enumerate(shapes_of(model)):
        if shape.intermediate_size % multiple:
            raise UserError(
                f"prune: {settings.method} removes no channels, and the {shape.intermediate_size:,} of layer {i} are "
                f"no multiple of {multiple} (width_multiple); leave that out, or take another method"
            )
