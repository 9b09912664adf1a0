"""Taking components out of a model: a new one, of the shape that remains, holding the remaining weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from graftlm.anatomy import Block, decoder_layers, read_anatomy
from graftlm.errors import UserError
from graftlm.parts import parts
from graftlm.pruning.per_layer_modeling import output_projections
from graftlm.pruning.shapes import LayerShape, head_dim_of, shaped_config, shapes_of


def prunable_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The heads and channels of every layer that still has any (Anatomy.blocks, single key-value groups included)."""
    return read_anatomy(model, smallest=1).blocks


@torch.no_grad()
def keep_components(model: PreTrainedModel, kept: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model with only the components `kept`; computes what `model` does without the others.

    A norm over all heads at once (OLMo2) is then over those that remain.

    Args:
        model: left without its weights where the new model took them; do not use it afterwards.
        kept: by block name (Anatomy.blocks), ids of components (key-value groups with all their query heads,
            channels): int64 [n], each once. They stay in ascending order. Blocks that are not named stay whole.

    Raises UserError for a block or component that does not exist, and for a family without a per-layer class.
    """
    slices = kept_slices(model, kept)
    config = shaped_config(model.config, _shapes_after(model, kept), head_dim_of(model))
    return rebuilt(model, config, lambda name, tensor: _sliced(tensor, slices.get(name)))


@torch.no_grad()
def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model of only the decoder layers `layers` (from 0, each once), which stay in ascending order.

    What is left of `model` must not be used afterwards. Raises UserError for a layer that does not exist, for none,
    and for a family without a per-layer class.
    """
    path, old = decoder_layers(model)
    ids = sorted(layers)
    if not ids or len(set(ids)) != len(ids) or not 0 <= ids[0] <= ids[-1] < len(old):
        raise UserError(f"prune: there are layers 0 to {len(old) - 1}, of which some stay, each once: not {ids}")
    shapes = shapes_of(model)
    config = shaped_config(model.config, [shapes[i] for i in ids], head_dim_of(model), ids)
    places = {f"{path}.{i}": f"{path}.{place}" for place, i in enumerate(ids)}

    def renamed(name: str) -> str | None:
        if not name.startswith(f"{path}."):
            return name
        layer, _, within = name[len(path) + 1 :].partition(".")
        place = places.get(f"{path}.{layer}")
        return None if place is None else f"{place}.{within}"

    return rebuilt(model, config, lambda _, tensor: tensor, renamed)


@torch.no_grad()
def add_output_biases(
    model: PreTrainedModel, biases: Mapping[int, tuple[Tensor | None, Tensor | None]]
) -> PreTrainedModel:
    """A model whose output projections add constants (bias compensation: FLAP, section 3.4).

    Where a projection has a bias already, the constant is added to it.

    Args:
        model: left without its weights; do not use it afterwards.
        biases: by layer, what its attention and its FFN add: float [hidden size] each, None for nothing. The layers
            named here get both biases, which is what config.json can say.

    Raises UserError for a layer that does not exist, and for a family without a per-layer class.
    """
    _, layers = decoder_layers(model)
    shapes = shapes_of(model)
    for i in biases:
        if not 0 <= i < len(layers):
            raise UserError(f"prune: biases for layer {i}; there are layers 0 to {len(layers) - 1}")
        shapes[i] = replace(shapes[i], output_biases=True)
    config = shaped_config(model.config, shapes, head_dim_of(model))
    for i, given in biases.items():
        for output, bias in zip(output_projections(layers[i]), given, strict=True):
            if output.bias is None:
                zeros = output.weight.new_zeros(output.out_features)
                output.bias = nn.Parameter(zeros, requires_grad=output.weight.requires_grad)
            if bias is not None:
                output.bias.add_(bias.to(output.bias))
    return rebuilt(model, config, lambda _, tensor: tensor)


def kept_slices(model: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, tuple[int, Tensor]]:
    """For each parameter that loses rows or columns: the dimension, and the positions along it that stay, int64 [m].

    An optimizer's moments of the parameter survive with the same positions. A block that keeps nothing keeps no
    position. Raises UserError for a block or component that does not exist.
    """
    blocks = {block.name: block for block in prunable_blocks(model)}
    slices: dict[str, tuple[int, Tensor]] = {}
    for name, ids in kept.items():
        if name not in blocks:
            raise UserError(f"prune: {name} is no block of this model; there are {', '.join(blocks)}")
        block = blocks[name]
        ids = ids.unique()  # sorted
        if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < block.components:
            raise UserError(f"prune: {name} has components 0 to {block.components - 1}, not {ids.tolist()}")
        if len(ids) == block.components:
            continue
        for part in parts(model, block):
            # Slot by slot is expansion's order; a weight's own order is component by component.
            positions = part.matrix.index(ids).flatten().sort().values
            before = slices.get(part.path)  # a fused projection holds several matrices
            joined = positions if before is None else torch.cat([before[1], positions]).sort().values
            slices[part.path] = (part.matrix.dim, joined)
    return slices


def rebuilt(
    model: PreTrainedModel,
    config: Any,
    part: Callable[[str, Tensor], Tensor | None],
    renamed: Callable[[str], str | None] = lambda name: name,
) -> PreTrainedModel:
    """A model of `config` with the tensors of `model`: `part(name, tensor)` gives each, or None where it goes;
    `renamed(name)` says where it goes, or None.

    Weights are moved one by one, so that no second model is ever held; `model` is empty afterwards. Parameters keep
    dtype, device and requires_grad, and lose their gradients. Raises ValueError where the two do not fit.
    """
    with torch.device("meta"), no_init_weights():
        new: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    wanted = dict(new.named_parameters())
    # By name, so that a parameter dies when its turn is over; tied ones under both of theirs, or they would live on.
    for name in [name for name, _ in model.named_parameters(remove_duplicate=False)]:
        place = renamed(name)
        owner, leaf = _owner(model, name)
        parameter = owner._parameters[leaf]
        assert parameter is not None
        tensor = part(name, parameter.data) if place in wanted else None
        owner._parameters[leaf] = None
        if tensor is None or place is None:
            continue
        if tensor.shape != wanted[place].shape:
            raise ValueError(f"{place} is {list(tensor.shape)}, the config asks for {list(wanted[place].shape)}")
        owner, leaf = _owner(new, place)
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    for name, buffer in model.named_buffers():
        if (place := renamed(name)) is not None:
            owner, leaf = _owner(new, place)
            owner._buffers[leaf] = buffer
    new.tie_weights()
    if missing := [name for name, p in new.named_parameters() if p.is_meta]:
        raise ValueError(f"no weights for {missing[0]} and {len(missing) - 1} more")
    new.generation_config = model.generation_config
    return new.train(model.training)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _sliced(tensor: Tensor, positions: tuple[int, Tensor] | None) -> Tensor:
    return tensor if positions is None else tensor.index_select(positions[0], positions[1].to(tensor.device))


def _shapes_after(model: PreTrainedModel, kept: Mapping[str, Tensor]) -> list[LayerShape]:
    shapes = [shape.overrides() for shape in shapes_of(model)]
    for block in prunable_blocks(model):
        if block.name in kept:
            count = len(kept[block.name].unique())
            if block.kind == "heads":
                shapes[block.layer] |= {"num_key_value_heads": count, "num_attention_heads": count * block.slots}
            else:
                shapes[block.layer] |= {"intermediate_size": count}
    return [LayerShape(**shape) for shape in shapes]
