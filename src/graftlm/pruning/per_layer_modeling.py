"""Causal language models whose layers differ: stock decoder layers, each built from its own config.

This file stands alone (torch and transformers), because a copy of it lies in every checkpoint that needs it:
`trust_remote_code=True` opens such a checkpoint where graftlm is not installed.

`config.per_layer_config[i]` (a feature of transformers' configs) gives layer i's `num_attention_heads`,
`num_key_value_heads` and `intermediate_size`. Without heads a layer has no attention; without channels its FFN adds
nothing. `output_biases: true` gives the layer's two output projections biases.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaDecoderLayer, GemmaForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2Config, Gemma2DecoderLayer, Gemma2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer, LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralConfig, MistralDecoderLayer, MistralForCausalLM
from transformers.models.olmo2.modeling_olmo2 import Olmo2Config, Olmo2DecoderLayer, Olmo2ForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3DecoderLayer, Phi3ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2DecoderLayer, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3DecoderLayer, Qwen3ForCausalLM
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Config, SmolLM3DecoderLayer, SmolLM3ForCausalLM

PREFIX = "per_layer_"


class PerLayerConfig:
    """What a config of this file adds to its stock class."""

    def validate_architecture(self) -> None:
        """Stock configs look at their own numbers of heads, which are no layer's here; the check that they divide the
        hidden size is an assumption of theirs besides."""


class NoAttention(nn.Module):
    """In the place of attention without heads: adds nothing to the residual stream."""

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **_: Any) -> tuple[Tensor, None]:
        if past_key_values is not None:  # positions are counted by what lies in a cache's layers
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(nothing, nothing, self.layer_idx)
        return torch.zeros_like(hidden_states), None


def _layer(layer_class: type[nn.Module], config: Any, index: int) -> nn.Module:
    own = config.per_layer_config[index]
    heads = own.num_attention_heads
    if not heads:  # built with one head, which is then dropped
        own.num_attention_heads = own.num_key_value_heads = 1
    layer: Any = layer_class(own, index)
    if not heads:
        layer.self_attn = NoAttention(index)
    if getattr(own, "output_biases", False):
        for module, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            if (output := getattr(module, name, None)) is not None and output.bias is None:
                output.bias = nn.Parameter(torch.zeros(output.out_features))
    return layer


class PerLayer:
    """What a model of this file adds to its stock class."""

    layer_class: type[nn.Module]

    def __init__(self, config: Any):
        given = {**config.to_dict(), "num_hidden_layers": 0, "layer_types": None}
        del given["per_layer_config"]
        no_layers = type(config).from_dict(given)
        no_layers._attn_implementation = config._attn_implementation
        super().__init__(no_layers)  # type: ignore[call-arg]
        model: Any = self
        model.config = model.model.config = config
        model.model.layers.extend(_layer(self.layer_class, config, i) for i in range(config.num_hidden_layers))
        model.model.post_init()
        model.post_init()


@strict
class PerLayerLlamaConfig(PerLayerConfig, LlamaConfig):
    model_type = PREFIX + "llama"


class PerLayerLlamaForCausalLM(PerLayer, LlamaForCausalLM):
    config_class = PerLayerLlamaConfig
    layer_class = LlamaDecoderLayer


@strict
class PerLayerMistralConfig(PerLayerConfig, MistralConfig):
    model_type = PREFIX + "mistral"


class PerLayerMistralForCausalLM(PerLayer, MistralForCausalLM):
    config_class = PerLayerMistralConfig
    layer_class = MistralDecoderLayer


@strict
class PerLayerQwen2Config(PerLayerConfig, Qwen2Config):
    model_type = PREFIX + "qwen2"


class PerLayerQwen2ForCausalLM(PerLayer, Qwen2ForCausalLM):
    config_class = PerLayerQwen2Config
    layer_class = Qwen2DecoderLayer


@strict
class PerLayerQwen3Config(PerLayerConfig, Qwen3Config):
    model_type = PREFIX + "qwen3"


class PerLayerQwen3ForCausalLM(PerLayer, Qwen3ForCausalLM):
    config_class = PerLayerQwen3Config
    layer_class = Qwen3DecoderLayer


@strict
class PerLayerGemmaConfig(PerLayerConfig, GemmaConfig):
    model_type = PREFIX + "gemma"


class PerLayerGemmaForCausalLM(PerLayer, GemmaForCausalLM):
    config_class = PerLayerGemmaConfig
    layer_class = GemmaDecoderLayer


@strict
class PerLayerGemma2Config(PerLayerConfig, Gemma2Config):
    model_type = PREFIX + "gemma2"


class PerLayerGemma2ForCausalLM(PerLayer, Gemma2ForCausalLM):
    config_class = PerLayerGemma2Config
    layer_class = Gemma2DecoderLayer


@strict
class PerLayerOlmo2Config(PerLayerConfig, Olmo2Config):
    model_type = PREFIX + "olmo2"


class PerLayerOlmo2ForCausalLM(PerLayer, Olmo2ForCausalLM):
    config_class = PerLayerOlmo2Config
    layer_class = Olmo2DecoderLayer


@strict
class PerLayerSmolLM3Config(PerLayerConfig, SmolLM3Config):
    model_type = PREFIX + "smollm3"


class PerLayerSmolLM3ForCausalLM(PerLayer, SmolLM3ForCausalLM):
    config_class = PerLayerSmolLM3Config
    layer_class = SmolLM3DecoderLayer


@strict
class PerLayerPhi3Config(PerLayerConfig, Phi3Config):
    model_type = PREFIX + "phi3"

    def validate_rope(self) -> None:
        """As validate_architecture: the stock check divides by the config's own number of heads."""


class PerLayerPhi3ForCausalLM(PerLayer, Phi3ForCausalLM):
    config_class = PerLayerPhi3Config
    layer_class = Phi3DecoderLayer


FAMILIES: dict[str, tuple[type, type]] = {
    "llama": (PerLayerLlamaConfig, PerLayerLlamaForCausalLM),
    "mistral": (PerLayerMistralConfig, PerLayerMistralForCausalLM),
    "qwen2": (PerLayerQwen2Config, PerLayerQwen2ForCausalLM),
    "qwen3": (PerLayerQwen3Config, PerLayerQwen3ForCausalLM),
    "gemma": (PerLayerGemmaConfig, PerLayerGemmaForCausalLM),
    "gemma2": (PerLayerGemma2Config, PerLayerGemma2ForCausalLM),
    "olmo2": (PerLayerOlmo2Config, PerLayerOlmo2ForCausalLM),
    "smollm3": (PerLayerSmolLM3Config, PerLayerSmolLM3ForCausalLM),
    "phi3": (PerLayerPhi3Config, PerLayerPhi3ForCausalLM),
}
"""Model type of the stock family -> config and model class."""


def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM know these classes."""
    for config_class, model_class in FAMILIES.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)  # type: ignore[attr-defined]
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


if __name__.partition(".")[0] == "graftlm":
    register()
