"""Causal language models with a narrower, rotated residual stream (SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024).

This file stands alone (torch and transformers), because a copy of it lies in every checkpoint that needs it:
`trust_remote_code=True` opens such a checkpoint where graftlm is not installed.

`config.hidden_size` is the width of the sliced stream and `config.norm_size` the original one, by which the norms go on
dividing (they have no weights: those are folded into the matrices behind them). Every layer holds two matrices,
`attention_shortcut` and `feed_forward_shortcut`, that turn the residual stream from one block's basis into the next's.
"""

from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer, LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralConfig, MistralDecoderLayer, MistralForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3DecoderLayer, Phi3ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2DecoderLayer, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3DecoderLayer, Qwen3ForCausalLM
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Config, SmolLM3DecoderLayer, SmolLM3ForCausalLM

PREFIX = "sliced_"


class SlicedConfig:
    """What a config of this file adds to its stock class: `norm_size`, the hidden size before slicing."""

    def validate_architecture(self) -> None:
        """Stock configs ask that the number of heads divides the hidden size, which a sliced one does not."""


class RMSNorm(nn.Module):
    """Divides by the root mean square, without weights; the mean is over the original width."""

    def __init__(self, norm_size: int, eps: float):
        super().__init__()
        self.norm_size = norm_size
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        mean = wide.square().sum(-1, keepdim=True) / self.norm_size
        return (wide * torch.rsqrt(mean + self.eps)).to(hidden_states.dtype)


class SlicedLayer:
    """What a decoder layer of this file adds to its stock class: the residual stream's changes of basis."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        layer: Any = self
        width, size, eps = config.hidden_size, config.norm_size, config.rms_norm_eps
        layer.input_layernorm, layer.post_attention_layernorm = RMSNorm(size, eps), RMSNorm(size, eps)
        # [from the block's basis, to the next one's]
        layer.attention_shortcut = nn.Parameter(torch.eye(width))
        layer.feed_forward_shortcut = nn.Parameter(torch.eye(width))

    def attend(self, hidden_states: Tensor, **given: Any) -> Tensor:
        """The first half: attention [B, S, hidden size]."""
        layer: Any = self
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **given)
        return hidden_states @ layer.attention_shortcut + attended

    def feed(self, hidden_states: Tensor) -> Tensor:
        """The second half: FFN [B, S, hidden size]."""
        layer: Any = self
        fed: Tensor = layer.mlp(layer.post_attention_layernorm(hidden_states))
        return hidden_states @ layer.feed_forward_shortcut + fed

    def forward(self, *args: Any, **given: Any) -> Tensor:
        return self.feed(self.attend(*args, **given))


class Sliced:
    """What a model of this file adds to its stock class."""

    layer_class: type[nn.Module]

    def __init_subclass__(cls) -> None:
        cls._no_split_modules = [cls.layer_class.__name__]  # type: ignore[attr-defined] # on one device each

    def __init__(self, config: Any):
        given = {**config.to_dict(), "num_hidden_layers": 0, "layer_types": None}
        no_layers = type(config).from_dict(given)
        no_layers._attn_implementation = config._attn_implementation
        super().__init__(no_layers)  # type: ignore[call-arg]
        config._attn_implementation = no_layers._attn_implementation  # chosen just now where none was named
        model: Any = self
        model.config = model.model.config = config
        model.model.layers.extend(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        model.model.norm = RMSNorm(config.norm_size, config.rms_norm_eps)
        if hasattr(model.model, "has_sliding_layers"):  # looked for among no layers
            model.model.has_sliding_layers = "sliding_attention" in config.layer_types
        model.model.post_init()
        model.post_init()


@strict
class SlicedLlamaConfig(SlicedConfig, LlamaConfig):
    model_type = PREFIX + "llama"
    norm_size: int = 0


class SlicedLlamaDecoderLayer(SlicedLayer, LlamaDecoderLayer):
    pass


class SlicedLlamaForCausalLM(Sliced, LlamaForCausalLM):
    config_class = SlicedLlamaConfig
    layer_class = SlicedLlamaDecoderLayer


@strict
class SlicedMistralConfig(SlicedConfig, MistralConfig):
    model_type = PREFIX + "mistral"
    norm_size: int = 0


class SlicedMistralDecoderLayer(SlicedLayer, MistralDecoderLayer):
    pass


class SlicedMistralForCausalLM(Sliced, MistralForCausalLM):
    config_class = SlicedMistralConfig
    layer_class = SlicedMistralDecoderLayer


@strict
class SlicedQwen2Config(SlicedConfig, Qwen2Config):
    model_type = PREFIX + "qwen2"
    norm_size: int = 0


class SlicedQwen2DecoderLayer(SlicedLayer, Qwen2DecoderLayer):
    pass


class SlicedQwen2ForCausalLM(Sliced, Qwen2ForCausalLM):
    config_class = SlicedQwen2Config
    layer_class = SlicedQwen2DecoderLayer


@strict
class SlicedQwen3Config(SlicedConfig, Qwen3Config):
    model_type = PREFIX + "qwen3"
    norm_size: int = 0


class SlicedQwen3DecoderLayer(SlicedLayer, Qwen3DecoderLayer):
    pass


class SlicedQwen3ForCausalLM(Sliced, Qwen3ForCausalLM):
    config_class = SlicedQwen3Config
    layer_class = SlicedQwen3DecoderLayer


@strict
class SlicedSmolLM3Config(SlicedConfig, SmolLM3Config):
    model_type = PREFIX + "smollm3"
    norm_size: int = 0


class SlicedSmolLM3DecoderLayer(SlicedLayer, SmolLM3DecoderLayer):
    pass


class SlicedSmolLM3ForCausalLM(Sliced, SmolLM3ForCausalLM):
    config_class = SlicedSmolLM3Config
    layer_class = SlicedSmolLM3DecoderLayer


@strict
class SlicedPhi3Config(SlicedConfig, Phi3Config):
    model_type = PREFIX + "phi3"
    norm_size: int = 0
    head_dim: int | None = None

    def validate_rope(self) -> None:
        """The stock check divides the hidden size by the number of heads, which is no head's width here."""


class SlicedPhi3DecoderLayer(SlicedLayer, Phi3DecoderLayer):
    pass


class SlicedPhi3ForCausalLM(Sliced, Phi3ForCausalLM):
    config_class = SlicedPhi3Config
    layer_class = SlicedPhi3DecoderLayer


FAMILIES: dict[str, tuple[type, type]] = {
    "llama": (SlicedLlamaConfig, SlicedLlamaForCausalLM),
    "mistral": (SlicedMistralConfig, SlicedMistralForCausalLM),
    "qwen2": (SlicedQwen2Config, SlicedQwen2ForCausalLM),
    "qwen3": (SlicedQwen3Config, SlicedQwen3ForCausalLM),
    "smollm3": (SlicedSmolLM3Config, SlicedSmolLM3ForCausalLM),
    "phi3": (SlicedPhi3Config, SlicedPhi3ForCausalLM),
}
"""Model type of the stock family -> config and model class. Their norms come before attention and FFN, and commute with
a rotation once their weights are folded away."""

NORMS = ("input_layernorm", "post_attention_layernorm")
"""A stock layer's norms before attention and before the FFN."""


def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM know these classes, and save_pretrained put a copy of this file and an
    `auto_map` into what it writes of them."""
    for given in FAMILIES.values():
        config_class, model_class = cast(tuple[Any, Any], given)
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModelForCausalLM")
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


if __name__.partition(".")[0] == "graftlm":
    register()
