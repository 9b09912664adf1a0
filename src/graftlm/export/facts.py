"""What a file format must be told of a model, read from the model itself."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from graftlm.anatomy import decoder_layers, linear, model_family, read_anatomy
from graftlm.errors import UserError
from graftlm.pruning.per_layer_modeling import output_biases
from graftlm.pruning.shapes import LayerShape, head_dim_of, shapes_of


@dataclass(frozen=True)
class Rope:
    """Rotary positions."""

    kind: str
    """transformers' rope_type."""
    theta: float
    dimensions: int
    """Of a head that are rotated."""
    frequencies: Tensor
    """Angle a position, float32 [dimensions / 2]."""
    amplitude: float
    """Of what is rotated (1 without YaRN or LongRoPE)."""
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """A causal language model, in the terms of file formats."""

    family: str
    layers_at: str
    """Path of the list of decoder layers."""
    shapes: tuple[LayerShape, ...]
    hidden: int
    head_dim: int
    rows: int
    """Of the embedding."""
    tied: bool
    activation: str
    epsilon: float
    context: int
    window: int | None
    """Tokens that a layer with sliding attention sees; None: no layer has it."""
    sliding: tuple[bool, ...]
    rotated: tuple[bool, ...]
    """Which layers use rotary positions."""
    scale: float | None
    """Of query times key, where a layer has attention."""
    rope: Rope
    biases: frozenset[str]
    """Roles (anatomy.Matrix) that have a bias in some layer."""
    bias_only: frozenset[int]
    """Layers without heads whose attention still adds the bias of its output."""
    norms: frozenset[str]
    """Of queries and keys: head (over one head), all (over all heads), or none at all."""
    config: Any

    @property
    def uniform(self) -> bool:
        """Every layer is as wide as the first, and has both its parts."""
        widths = {(s.num_attention_heads, s.num_key_value_heads, s.intermediate_size) for s in self.shapes}
        return len(widths) == 1 and all(next(iter(widths)))


def read_facts(model: PreTrainedModel) -> Facts:
    """Read them. Raises UserError for a model whose kind is not in the table of families (anatomy.FAMILIES)."""
    config: Any = model.config.get_text_config()
    path, layers = decoder_layers(model)
    head_dim, shapes = head_dim_of(model), tuple(shapes_of(model))
    rotary = _rotary(model)
    parameters = dict(config.rope_parameters)
    types = list(getattr(config, "layer_types", None) or [])
    sliding_all = bool(getattr(config, "sliding_window", None)) and not types
    sliding = tuple(sliding_all or (types[i : i + 1] == ["sliding_attention"]) for i in range(len(layers)))
    no_rope = getattr(config, "no_rope_layers", None)
    embedding: Any = model.get_input_embeddings()
    attentions: list[Any] = [layer.self_attn for layer in layers]
    return Facts(
        family=model_family(model),
        layers_at=path,
        shapes=shapes,
        hidden=config.hidden_size,
        head_dim=head_dim,
        rows=embedding.weight.shape[0],
        tied=_is_tied(model),
        activation=getattr(config, "hidden_activation", None) or config.hidden_act,
        epsilon=config.rms_norm_eps,
        context=config.max_position_embeddings,
        window=config.sliding_window if any(sliding) else None,
        sliding=sliding,
        rotated=tuple(bool(used) for used in no_rope[: len(layers)]) if no_rope else (True,) * len(layers),
        scale=next((a.scaling for a in attentions if hasattr(a, "scaling")), None),
        rope=Rope(
            parameters.get("rope_type", "default"),
            parameters["rope_theta"],
            2 * len(rotary.inv_freq),
            rotary.inv_freq.float(),
            float(rotary.attention_scaling),
            parameters,
        ),
        biases=_biases(model, layers),
        bias_only=frozenset(
            i
            for i, (shape, layer) in enumerate(zip(shapes, layers, strict=True))
            if not shape.num_attention_heads and output_biases(layer)[0] is not None
        ),
        norms=_norms(model, layers),
        config=config,
    )


def _rotary(model: PreTrainedModel) -> Any:
    for module in model.modules():
        if isinstance(getattr(module, "inv_freq", None), Tensor):
            return module
    raise UserError(f"export: {type(model).__name__} has no rotary positions, and no target is known for it")


def _is_tied(model: PreTrainedModel) -> bool:
    embedding: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    return output.weight is embedding.weight


def _biases(model: PreTrainedModel, layers: nn.ModuleList) -> frozenset[str]:
    roles = {
        role
        for layer in layers  # also of what has lost all its components
        for role, bias in zip(("o", "down"), output_biases(layer), strict=True)
        if bias is not None
    }
    for block in read_anatomy(model, smallest=1).blocks:
        roles |= {m.role for m in (*block.mixed, *block.followers) if linear(model, m.module).bias is not None}
    return frozenset(roles)


def _norms(model: PreTrainedModel, layers: nn.ModuleList) -> frozenset[str]:
    over_all = {block.layer for block in read_anatomy(model, smallest=1).blocks if block.norms}
    there = [i for i, layer in enumerate(layers) if getattr(layer.self_attn, "q_norm", None) is not None]
    return frozenset("all" if i in over_all else "head" for i in there)
