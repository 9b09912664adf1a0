"""The built-in `tiny-llama`: a random model and a byte-level tokenizer, made from nothing, for tests and newcomers."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from graftlm.chat_templates import read_chat_template

SEED = 0
PAD, START, END = "<pad>", "<|im_start|>", "<|im_end|>"


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then <pad>, <|im_start|>, <|im_end|> (the end-of-sequence token): 259 tokens, ChatML template.

    No byte is unknown to it, so any text in any language survives encoding and decoding.
    """
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        chat_template=read_chat_template("chatml"),
    )


def build_tiny_model(*, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None) -> PreTrainedModel:
    """A Llama with 4 layers, 4 query heads, 2 key-value heads, hidden size 64, FFN width 192 and tied embeddings.

    The weights are the same every time (drawn in float32 from a seed of their own, then cast to `dtype`), and the
    global random state is left as it was.
    """
    tokenizer = build_tiny_tokenizer()
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        vocab_size=-(-len(tokenizer) // 8) * 8,  # rounded up, as real models do for the sake of the matrix units
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        drawn = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    # Not drawn.to(dtype): that would round the rotary frequencies too, which a checkpoint does not hold.
    model.load_state_dict(drawn.state_dict())
    return model.eval()
