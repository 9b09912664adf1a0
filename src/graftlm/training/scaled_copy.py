"""A scaled-down copy of a model: first layers, a part of the vocabulary, and of a huge one fewer heads and channels.

Nothing of the model itself is touched.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from graftlm.anatomy import decoder_layers
from graftlm.parts import count_parameters

LAYERS = 2
"""Layers of the copy: more would be no more exact, since each layer is timed where it runs, not by a difference."""
LARGE_LAYER = 2**25
"""Weights of a layer above which the copy has only one."""
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
"""What transformers' configs call the widths of a layer."""


def layers_to_copy(model: PreTrainedModel) -> int:
    """How many layers a copy of `model` has."""
    layers = decoder_layers(model)[1]
    return min(len(layers), LAYERS if max(map(count_parameters, layers)) <= LARGE_LAYER else 1)


def layers_copied(model: PreTrainedModel, count: int) -> list[int]:
    """Which `count` layers a copy has: the first; where layers differ, those of the most weights, which surely have
    what is trained."""
    layers = decoder_layers(model)[1]
    if not layers_differ(model):
        return list(range(min(count, len(layers))))
    return sorted(sorted(range(len(layers)), key=lambda i: -count_parameters(layers[i]))[:count])


def layers_differ(model: PreTrainedModel) -> bool:
    """Whether the model's class has layers of different shapes."""
    return bool(getattr(model.config.get_text_config(), "is_heterogeneous", False))


def narrow(model: PreTrainedModel, at_most: int) -> tuple[PreTrainedModel, int]:
    """A model without weights (on the meta device) of `model`'s kind whose layers have at most `at_most` weights, and
    how many times narrower it is: fewer heads of the same size (at least two groups of them, so that there can be
    strong and weak ones), fewer channels. `model` itself where it is so already, and where its layers differ.
    """
    if layers_differ(model):
        return model, 1
    text: Any = model.config.get_text_config()
    weights = count_parameters(decoder_layers(model)[1][0])
    widths = {name: getattr(text, name, None) or 1 for name in WIDTHS}
    times = 1
    while weights > at_most * times**2 and all(width % (4 * times) == 0 for width in widths.values()):
        times *= 2
    if times == 1:
        return model, 1
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for name, width in widths.items():
        setattr(text, name, width // times)
    attention = model.config._attn_implementation
    with torch.device("meta"):
        made: PreTrainedModel = type(model)._from_config(config, dtype=model.dtype, attn_implementation=attention)
    return made, times


def cut(model: PreTrainedModel, layers: int, vocabulary: int) -> PreTrainedModel:
    """A copy with `layers` layers (layers_copied), `vocabulary` rows of embedding and LM head; the rest is not copied.

    A model on the meta device gives a copy on the CPU with random weights.
    """
    _, found = decoder_layers(model)
    chosen = layers_copied(model, layers)
    kept = nn.ModuleList(found[i] for i in chosen)
    memo: dict[int, Any] = {}
    memo[id(found)] = copy.deepcopy(kept, memo)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in module.parameters() if module is not None else ():
            part = parameter.detach()[:vocabulary].clone()
            memo[id(parameter)] = memo.get(id(parameter), nn.Parameter(part, parameter.requires_grad))
    small = copy.deepcopy(model, memo)
    text: Any = small.config.get_text_config()
    text.num_hidden_layers = len(kept)
    if (types := getattr(text, "layer_types", None)) is not None:
        text.layer_types = [types[i] for i in chosen]
    text.vocab_size = small.config.vocab_size = vocabulary
    embedding: Any = small.get_input_embeddings()
    embedding.num_embeddings, embedding.padding_idx = vocabulary, None
    if next(small.parameters()).is_meta:
        small = small.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*small.parameters(), *small.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(std=0.02)
    return small
