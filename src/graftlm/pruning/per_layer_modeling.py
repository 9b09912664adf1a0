"""Causal language models whose layers differ: stock decoder layers, each built from its own config.

This file stands alone (torch and transformers), because a copy of it lies in every checkpoint that needs it:
`trust_remote_code=True` opens such a checkpoint where graftlm is not installed.

`config.per_layer_config[i]` (a feature of transformers' configs from 5.14 on) gives layer i's `num_attention_heads`,
`num_key_value_heads` and `intermediate_size`. Without heads a layer has no attention; without channels its FFN adds
nothing. `output_biases: true` gives the layer's two output projections biases.
"""

import warnings
from typing import Any, cast

import torch
import transformers

# ruff: noqa: E402 - older versions lack what is imported below, and would say that instead
OLDEST = (5, 14)
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"a model whose layers differ needs transformers {OLDEST[0]}.{OLDEST[1]} or newer, and this is "
        f"{transformers.__version__}: pip install -U transformers"
    )

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaDecoderLayer, GemmaForCausalLM, GemmaModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2Config, Gemma2DecoderLayer, Gemma2ForCausalLM, Gemma2Model
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import (
    MistralConfig,
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
)
from transformers.models.olmo2.modeling_olmo2 import Olmo2Config, Olmo2DecoderLayer, Olmo2ForCausalLM, Olmo2Model
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3DecoderLayer, Phi3ForCausalLM, Phi3Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model
from transformers.models.smollm3.modeling_smollm3 import (
    SmolLM3Config,
    SmolLM3DecoderLayer,
    SmolLM3ForCausalLM,
    SmolLM3Model,
)

PREFIX = "per_layer_"
FILE = "per_layer_modeling"


class PerLayerConfig:
    """What a config of this file adds to its stock class."""

    output_biases = False

    def validate_architecture(self) -> None:
        """Stock configs look at their own numbers of heads, which are no layer's here; the check that they divide the
        hidden size is an assumption of theirs besides."""


class NoHeads(nn.Module):
    """In the place of attention without heads: adds nothing to the residual stream, or its output bias. (Its name says
    nothing of attention: transformers takes a file with such a class for one that computes attention itself.)"""

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.o_proj: nn.Linear | None = None

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **_: Any) -> tuple[Tensor, None]:
        if past_key_values is not None:  # positions are counted by what lies in a cache's layers
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(nothing, nothing, self.layer_idx)
        no_heads = hidden_states[..., :0]  # a zero that depends on its input: no parameter goes without a gradient
        if self.o_proj is None:
            return no_heads.sum(-1, keepdim=True).expand_as(hidden_states), None
        return self.o_proj(no_heads), None


class NoInputs(nn.Linear):
    """A projection without inputs, which only holds a bias: there is nothing to initialise, of which torch would
    warn."""

    def reset_parameters(self) -> None:
        """Leaves all as it is."""


def output_projections(layer: Any) -> tuple[nn.Linear, nn.Linear]:
    """Where a decoder layer's attention and its FFN return to the residual stream; attention without heads gets one,
    without inputs, that can hold a bias."""
    if layer.self_attn.o_proj is None:
        down = layer.mlp.down_proj
        like: Any = {"dtype": down.weight.dtype, "device": down.weight.device}
        layer.self_attn.o_proj = NoInputs(0, down.out_features, bias=False, **like)
    return layer.self_attn.o_proj, layer.mlp.down_proj


def output_biases(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """Biases of those two, where there are any."""
    attention = layer.self_attn.o_proj
    return None if attention is None else attention.bias, layer.mlp.down_proj.bias


def _layer(layer_class: type[nn.Module], config: Any, index: int) -> nn.Module:
    own = config.per_layer_config[index]
    heads = own.num_attention_heads
    if not heads:  # built with one head, which is then dropped
        own.num_attention_heads = own.num_key_value_heads = 1
    layer: Any = layer_class(own, index)
    if not heads:
        stock_bias = layer.self_attn.o_proj.bias
        layer.self_attn = NoHeads(index)
        if stock_bias is not None:
            output_projections(layer)[0].bias = stock_bias
    for output in output_projections(layer) if own.output_biases else ():
        if output.bias is None:
            output.bias = nn.Parameter(torch.zeros(output.out_features))
    return layer


def _without_layers(config: Any) -> Any:
    given = {**config.to_dict(), "num_hidden_layers": 0}
    for key in ("per_layer_config", "layer_types"):
        given.pop(key, None)
    no_layers = type(config).from_dict(given)
    no_layers._attn_implementation = config._attn_implementation
    return no_layers


class OwnConfigs:
    """Each layer has a config of its own, which follows the model's where that changes later."""

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in the stock class."""
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        model: Any = self
        for module in model.modules():
            if getattr(module, "config", None) is not None:
                module.config._attn_implementation_internal = model.config._attn_implementation


class PerLayerModel(OwnConfigs):
    """What a decoder of this file adds to its stock class."""

    layer_class: type[nn.Module]

    def __init__(self, config: Any):
        no_layers = _without_layers(config)
        super().__init__(no_layers)  # type: ignore[call-arg]
        config._attn_implementation = no_layers._attn_implementation  # chosen just now where none was named
        model: Any = self
        model.config = config
        with warnings.catch_warnings():  # of widths that are zero on purpose
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            model.layers.extend(_layer(self.layer_class, config, i) for i in range(config.num_hidden_layers))
        if hasattr(model, "has_sliding_layers"):  # looked for among no layers
            model.has_sliding_layers = "sliding_attention" in config.layer_types
        model.post_init()


class PerLayerForCausalLM(OwnConfigs):
    """What a language model of this file adds to its stock class."""

    model_class: type[nn.Module]

    def __init__(self, config: Any):
        super().__init__(_without_layers(config))  # type: ignore[call-arg]
        model: Any = self
        model.model = self.model_class(config)
        model.config = config
        # save_pretrained adds its own class only; servers open the decoder
        config.auto_map = {"AutoModel": f"{FILE}.{self.model_class.__name__}"} | (
            getattr(config, "auto_map", None) or {}
        )
        model.post_init()


@strict
class PerLayerLlamaConfig(PerLayerConfig, LlamaConfig):
    model_type = PREFIX + "llama"


class PerLayerLlamaModel(PerLayerModel, LlamaModel):
    config_class = PerLayerLlamaConfig
    layer_class = LlamaDecoderLayer


class PerLayerLlamaForCausalLM(PerLayerForCausalLM, LlamaForCausalLM):
    config_class = PerLayerLlamaConfig
    model_class = PerLayerLlamaModel


@strict
class PerLayerMistralConfig(PerLayerConfig, MistralConfig):
    model_type = PREFIX + "mistral"


class PerLayerMistralModel(PerLayerModel, MistralModel):
    config_class = PerLayerMistralConfig
    layer_class = MistralDecoderLayer


class PerLayerMistralForCausalLM(PerLayerForCausalLM, MistralForCausalLM):
    config_class = PerLayerMistralConfig
    model_class = PerLayerMistralModel


@strict
class PerLayerQwen2Config(PerLayerConfig, Qwen2Config):
    model_type = PREFIX + "qwen2"


class PerLayerQwen2Model(PerLayerModel, Qwen2Model):
    config_class = PerLayerQwen2Config
    layer_class = Qwen2DecoderLayer


class PerLayerQwen2ForCausalLM(PerLayerForCausalLM, Qwen2ForCausalLM):
    config_class = PerLayerQwen2Config
    model_class = PerLayerQwen2Model


@strict
class PerLayerQwen3Config(PerLayerConfig, Qwen3Config):
    model_type = PREFIX + "qwen3"


class PerLayerQwen3Model(PerLayerModel, Qwen3Model):
    config_class = PerLayerQwen3Config
    layer_class = Qwen3DecoderLayer


class PerLayerQwen3ForCausalLM(PerLayerForCausalLM, Qwen3ForCausalLM):
    config_class = PerLayerQwen3Config
    model_class = PerLayerQwen3Model


@strict
class PerLayerGemmaConfig(PerLayerConfig, GemmaConfig):
    model_type = PREFIX + "gemma"


class PerLayerGemmaModel(PerLayerModel, GemmaModel):
    config_class = PerLayerGemmaConfig
    layer_class = GemmaDecoderLayer


class PerLayerGemmaForCausalLM(PerLayerForCausalLM, GemmaForCausalLM):
    config_class = PerLayerGemmaConfig
    model_class = PerLayerGemmaModel


@strict
class PerLayerGemma2Config(PerLayerConfig, Gemma2Config):
    model_type = PREFIX + "gemma2"


class PerLayerGemma2Model(PerLayerModel, Gemma2Model):
    config_class = PerLayerGemma2Config
    layer_class = Gemma2DecoderLayer


class PerLayerGemma2ForCausalLM(PerLayerForCausalLM, Gemma2ForCausalLM):
    config_class = PerLayerGemma2Config
    model_class = PerLayerGemma2Model


@strict
class PerLayerOlmo2Config(PerLayerConfig, Olmo2Config):
    model_type = PREFIX + "olmo2"


class PerLayerOlmo2Model(PerLayerModel, Olmo2Model):
    config_class = PerLayerOlmo2Config
    layer_class = Olmo2DecoderLayer


class PerLayerOlmo2ForCausalLM(PerLayerForCausalLM, Olmo2ForCausalLM):
    config_class = PerLayerOlmo2Config
    model_class = PerLayerOlmo2Model


@strict
class PerLayerSmolLM3Config(PerLayerConfig, SmolLM3Config):
    model_type = PREFIX + "smollm3"


class PerLayerSmolLM3Model(PerLayerModel, SmolLM3Model):
    config_class = PerLayerSmolLM3Config
    layer_class = SmolLM3DecoderLayer


class PerLayerSmolLM3ForCausalLM(PerLayerForCausalLM, SmolLM3ForCausalLM):
    config_class = PerLayerSmolLM3Config
    model_class = PerLayerSmolLM3Model


@strict
class PerLayerPhi3Config(PerLayerConfig, Phi3Config):
    model_type = PREFIX + "phi3"

    def validate_rope(self) -> None:
        """As validate_architecture: the stock check divides by the config's own number of heads."""


class PerLayerPhi3Model(PerLayerModel, Phi3Model):
    config_class = PerLayerPhi3Config
    layer_class = Phi3DecoderLayer


class PerLayerPhi3ForCausalLM(PerLayerForCausalLM, Phi3ForCausalLM):
    config_class = PerLayerPhi3Config
    model_class = PerLayerPhi3Model


FAMILIES: dict[str, tuple[type, type[nn.Module]]] = {
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
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know these classes, and save_pretrained put a copy of this
    file and an `auto_map` into what it writes of them."""
    for given in FAMILIES.values():
        config_class, language_model = cast(tuple[Any, Any], given)
        for auto, known in ((AutoModel, language_model.model_class), (AutoModelForCausalLM, language_model)):
            known.register_for_auto_class(auto.__name__)
            auto.register(config_class, known, exist_ok=True)
        config_class.register_for_auto_class()
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


if __name__.partition(".")[0] == "graftlm":
    register()
