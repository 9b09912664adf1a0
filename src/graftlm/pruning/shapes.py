"""How wide each layer of a model is: what pruning changes, and what a config must say of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from graftlm.anatomy import PER_LAYER, read_anatomy
from graftlm.errors import UserError

LAYER_LISTS = ("layer_types", "no_rope_layers")
"""Fields of configs that have one entry a layer."""


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer's widths. The names are those that configs of transformers have."""

    num_attention_heads: int
    """Query heads; 0: no attention."""
    num_key_value_heads: int
    """Key-value groups."""
    intermediate_size: int
    """Channels of the FFN; 0: the FFN adds nothing."""
    output_biases: bool = False
    """The two output projections have biases although the family's have none (bias compensation)."""

    def overrides(self) -> dict[str, Any]:
        """What per_layer_config says of the layer."""
        given = asdict(self)
        if not self.output_biases:
            del given["output_biases"]
        return given


def shapes_of(model: nn.Module) -> list[LayerShape]:
    """The shape of every decoder layer, from outside in."""
    anatomy = read_anatomy(model, smallest=1)
    widths: list[dict[str, int]] = [
        {"num_attention_heads": 0, "num_key_value_heads": 0, "intermediate_size": 0} for _ in range(anatomy.layers)
    ]
    config: Any = model.config
    biases = [bool(getattr(own, "output_biases", False)) for own in config.get_text_config().per_layer_config]
    for block in anatomy.blocks:
        if block.kind == "heads":
            widths[block.layer] |= {"num_attention_heads": block.ranked, "num_key_value_heads": block.components}
        else:
            widths[block.layer] |= {"intermediate_size": block.components}
    return [LayerShape(**w, output_biases=b) for w, b in zip(widths, biases, strict=True)]


def per_layer_config_class(config: PretrainedConfig) -> Any:
    """Config class of the per-layer family that `config` belongs to. Raises UserError where there is none."""
    from graftlm.pruning.per_layer_modeling import FAMILIES

    family = str(config.model_type).removeprefix(PER_LAYER)
    if family not in FAMILIES:
        experts = any("experts" in key for key in config.to_dict())
        why = "its FFNs are of experts, which pruning cannot take" if experts else "pruning does not know its layers"
        raise UserError(f"model type {family}: {why}; prune a model of {', '.join(FAMILIES)}")
    return FAMILIES[family][0]


def shaped_config(
    config: PretrainedConfig, shapes: Sequence[LayerShape], head_dim: int, layers: Sequence[int] | None = None
) -> PretrainedConfig:
    """A config like `config` for layers of `shapes`: stock where all layers are alike and the stock family takes it,
    of the per-layer family otherwise (pruning/per_layer_modeling.py).

    `layers`: which of the layers of `config` these are, ascending; None: all.

    Raises UserError for a family that has no per-layer class.
    """
    per_layer_class = per_layer_config_class(config)
    given = config.to_dict()
    for key in ("model_type", "per_layer_config", "auto_map", "architectures"):
        given.pop(key, None)
    given |= {"num_hidden_layers": len(shapes), "head_dim": head_dim}
    if layers is not None:
        given |= {key: [given[key][i] for i in layers] for key in LAYER_LISTS if given.get(key) is not None}
    first = shapes[0]
    if len(set(shapes)) == 1 and first.num_attention_heads and first.intermediate_size and not first.output_biases:
        stock: Any = per_layer_class.__mro__[2]
        try:
            return _with_settings(stock(**{**given, **first.overrides()}), config)
        except (ValueError, StrictDataclassError):  # a stock check, such as heads that must divide the hidden size
            pass
    overrides = {i: shape.overrides() for i, shape in enumerate(shapes)}
    return _with_settings(per_layer_class(**given, per_layer_config=overrides), config)


def _with_settings(new: PretrainedConfig, old: PretrainedConfig) -> PretrainedConfig:
    new._attn_implementation = old._attn_implementation
    new.dtype = old.dtype
    return new


def names_head_dim(config: PretrainedConfig) -> bool:
    """Whether the family's config has a head_dim; else only transformers reads the one that is written there."""
    return "head_dim" in {field.name for field in fields(type(config))}  # type: ignore[arg-type]


def head_dim_of(model: PreTrainedModel) -> int:
    """Width of a head: the same in every layer."""
    block = next(read_anatomy(model, smallest=1).of_kind("heads"), None)
    return int(model.config.head_dim) if block is None else block.width
