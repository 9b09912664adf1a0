"""Tiny random models of every family, for tests."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo2", "smollm3", "phi3")
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model of `family`; biases are random too, so that a bias left out shows."""
    config = AutoConfig.for_model(family, **{**SHAPE, **changes})
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # .to() would round rotary buffers too
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() == 2:
                # wider than the usual 0.02, so that no gradient drowns in rounding
                torch.nn.init.normal_(parameter, std=0.15)
    return model


def batches(
    count: int, *, rows: int = 2, length: int = 12, vocab: int = 64, seed: int = 1
) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(3, vocab, (rows, length), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def unequal_batches() -> list[dict[str, Tensor]]:
    """Two batches of different numbers of rows and of tokens: whether batches or tokens count alike is seen."""
    return [
        {"input_ids": batches(1, rows=3)[0]["input_ids"]},
        {"input_ids": batches(1, rows=1, length=5, seed=2)[0]["input_ids"]},
    ]


def nats_and_tokens(model: nn.Module, ids: Tensor) -> tuple[Tensor, int]:
    """Sum of the losses of `ids` [rows, tokens], and of how many tokens it is one."""
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"), ids[:, 1:].numel()
