"""Letting a model write: a prompt in, text out as it comes."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from graftlm.errors import UserError
from graftlm.models import check_vocabulary, context_of, load_model, load_tokenizer, to_gpu


def generate(
    model_name: str,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    chat: bool | None = None,
    stream: bool = True,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> str:
    """`graftlm generate`: open a model, on the GPU where there is one, and return what it writes after `prompt`;
    arguments as in `generate_text`."""
    tokenizer = load_tokenizer(model_name, trust_remote_code=trust_remote_code)
    model = to_gpu(load_model(model_name, dtype=dtype, trust_remote_code=trust_remote_code))
    return generate_text(
        model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, chat=chat, stream=stream
    )


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    chat: bool | None = None,
    stream: bool = True,
) -> str:
    """What `model` writes after `prompt`, without the prompt and without special tokens.

    `temperature`: 0 takes the likeliest token each time, above 0 samples; no penalty nor cut of the model's
    generation_config applies. `chat`: put the prompt into the tokenizer's
    chat template as the user's message; None: if it has one. `stream`: also print the text to stdout while it comes.
    Stops at `max_new_tokens` or at an end-of-sequence token (the tokenizer's or one of the model's generation_config).
    Raises UserError when a template is asked for and there is none, when prompt and answer do not fit the model's
    context, and for settings out of range.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: {max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature: {temperature} must be 0 (the likeliest token) or above")
    check_vocabulary(model, tokenizer)
    ids = _encode(tokenizer, prompt, chat).to(model.device)  # [1, S]
    longest = context_of(model)
    if longest is not None and ids.shape[1] + max_new_tokens > longest:
        raise UserError(
            f"the prompt's {ids.shape[1]} tokens and max_new_tokens {max_new_tokens} exceed the model's context of "
            f"{longest}; shorten the prompt or lower max_new_tokens"
        )
    # What is not given here would be taken from the model's generation_config, or from transformers' own defaults.
    sampling: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    if temperature:
        sampling |= {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=_end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    output = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer
    )  # [1, S + new]
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None) -> torch.Tensor:
    """The prompt's ids, [1, S], at least one."""
    if chat and not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; leave chat off, or open it with chat_template: chatml")
    if chat or (chat is None and tokenizer.chat_template):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(text, add_special_tokens=False)  # the template writes them
    else:
        ids = tokenizer.encode(prompt)
    if not ids:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise UserError("the prompt is empty, and the tokenizer has no token to start from; give a prompt")
        ids = [start]
    return torch.tensor([ids])


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    known = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = set(known if isinstance(known, list) else [known]) | {tokenizer.eos_token_id}
    return sorted(end for end in ends if end is not None) or None
