"""A pruned model in a stock class: every layer padded with zeros up to the widest.

It computes what the pruned model computes, at the speed and size of its widest layer: for servers that take stock
classes only. A head of zeros reads zero values, and a channel of zeros passes zero on; both add exact zeros to sums. A
sum of more terms may be taken in another order, so logits differ by rounding.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from graftlm.anatomy import Block, Matrix, decoder_layers, is_per_layer, model_family
from graftlm.errors import UserError
from graftlm.models import has_own_class
from graftlm.pruning.per_layer_modeling import output_biases
from graftlm.pruning.shapes import LayerShape, head_dim_of, names_head_dim, shaped_config, shapes_of
from graftlm.pruning.surgery import prunable_blocks

BIASES = ("attention_bias", "mlp_bias")
"""Fields of stock configs that give the output projection of attention and of the FFN a bias, among others."""


@torch.no_grad()
def padded(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the stock class that computes what `model` does: itself where it is of one already, else a new one.

    Heads are padded to the widest layer's, and further where the stock config or those who read it need that: to a
    number that divides the hidden size, and to hidden size = heads * head_dim where the family's config has no head_dim
    of its own (others then compute it). A norm over all heads at once (OLMo2) stays exact: its inputs grow by
    sqrt(padded width / width), its weights shrink by as much.

    Raises UserError for shapes that no stock class has, and for constants that stand in for what was pruned (FLAP) in a
    family whose stock class has no biases there.
    """
    if not has_own_class(model):
        return model
    if not is_per_layer(model.config):
        raise UserError(
            f"{model.config.model_type}: this is no matter of widths, so padding makes no stock class of it"
        )
    config = _config(model)
    with no_init_weights():
        new: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    new.to(device=model.device)  # type: ignore[call-arg]
    blocks = {block.name: block for block in prunable_blocks(new)}
    parts = {m.module for block in blocks.values() for m in (*block.mixed, *block.followers, *block.norms)}
    old = dict(model.named_parameters())
    for name, parameter in new.named_parameters():
        if name.rpartition(".")[0] in parts:
            parameter.zero_()
        elif name in old:
            parameter.copy_(old[name])
        else:  # a norm of heads that are zero
            parameter.fill_(1)
    for block in prunable_blocks(model):
        _copy_block(model, block, new, blocks[block.name])
    _copy_output_biases(model, new)
    new.tie_weights()
    new.generation_config = model.generation_config
    return new.train(model.training)


def _config(model: PreTrainedModel) -> PretrainedConfig:
    shapes, head_dim = shapes_of(model), head_dim_of(model)
    config: Any = copy.deepcopy(model.config)
    for i, key in enumerate(BIASES):
        biases = [output_biases(layer)[i] for layer in decoder_layers(model)[1]]
        if hasattr(config, key) and any(bias is not None and bias.any() for bias in biases):
            setattr(config, key, True)
    slots = max((s.num_attention_heads // s.num_key_value_heads for s in shapes if s.num_attention_heads), default=1)
    channels = max(1, *(shape.intermediate_size for shape in shapes))
    widest = max(1, *(shape.num_key_value_heads for shape in shapes))
    accepted = None
    for groups in range(widest, max(widest, config.hidden_size // slots) + 1):
        shape = LayerShape(groups * slots, groups, channels)
        found = shaped_config(config, [shape] * len(shapes), head_dim)
        if is_per_layer(found):  # the stock class refuses it
            continue
        accepted = accepted or found
        if names_head_dim(found) or shape.num_attention_heads * head_dim == config.hidden_size:
            return found
    if accepted is not None:
        return accepted
    raise UserError(
        f"{model_family(model)}: no number of heads from {widest * slots} on fits a hidden size of {config.hidden_size}"
    )


def _copy_output_biases(model: PreTrainedModel, new: PreTrainedModel) -> None:
    pairs = zip(decoder_layers(model)[1], decoder_layers(new)[1], strict=True)
    for i, (old_layer, new_layer) in enumerate(pairs):
        for what, before, after in zip(BIASES, output_biases(old_layer), output_biases(new_layer), strict=True):
            if before is None:
                continue
            if after is not None:
                after.copy_(before)
            elif before.any():
                raise UserError(
                    f"layer {i} adds constants that stand in for what was pruned, and {model_family(model)}'s stock "
                    f"class has no {what} to hold them; prune by a method that adds none"
                )


def _copy_block(model: nn.Module, block: Block, new: nn.Module, wider: Block) -> None:
    """Write `block`'s weights to the first components of `wider`."""
    ids = torch.arange(block.components)
    over_all = list(zip(block.norms, wider.norms, strict=True))
    grown = (wider.components / block.components) ** 0.5
    scales = {norm.role.removesuffix("_norm"): grown for _, norm in over_all}
    pairs = zip((*block.mixed, *block.followers), (*wider.mixed, *wider.followers), strict=True)
    for before, after in pairs:
        _copy(model, before, new, after, ids, scales.get(before.role, 1.0))
    for before, after in over_all:
        _copy(model, before, new, after, ids, 1 / grown)


def _copy(model: nn.Module, before: Matrix, new: nn.Module, after: Matrix, ids: Tensor, scale: float) -> None:
    source, target = model.get_submodule(before.module), new.get_submodule(after.module)
    for name in ("weight", "bias") if before.dim == 0 else ("weight",):
        values, place = getattr(source, name, None), getattr(target, name, None)
        if isinstance(values, Tensor) and isinstance(place, Tensor):
            positions, places = (m.index(ids).flatten().to(values.device) for m in (before, after))
            rows = values.index_select(before.dim, positions)
            place.index_copy_(after.dim, places, rows if scale == 1 else rows * scale)
