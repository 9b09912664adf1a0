"""Generation against a plain loop, with and without a chat template."""

import pytest
import torch

from graftlm.errors import UserError
from graftlm.generation import generate, generate_text
from graftlm.models import load_model, load_tokenizer


@pytest.fixture
def model():
    """Sharper than at random, where tied embeddings make every token predict itself."""
    model = load_model("tiny-llama")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture
def tokenizer():
    return load_tokenizer("tiny-llama")


def greedy(model, ids: list[int], steps: int) -> list[int]:
    for _ in range(steps):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


@pytest.mark.parametrize("chat", [None, True, False])
def test_greedy_equals_a_plain_loop(model, tokenizer, chat, capsys):
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n" if chat in (None, True) else "Hello"
    ids = tokenizer.encode(prompt)
    new = greedy(model, ids, 12)[len(ids) :]
    assert tokenizer.eos_token_id not in new
    assert len(set(new)) > 3
    expected = tokenizer.decode(new, skip_special_tokens=True)
    assert generate_text(model, tokenizer, "Hello", max_new_tokens=12, chat=chat, stream=False) == expected
    assert capsys.readouterr().out == ""


def test_streaming_prints_the_answer_and_not_the_prompt(model, tokenizer, capsys):
    text = generate_text(model, tokenizer, "Hello", max_new_tokens=12)
    assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")
    assert text


@pytest.mark.parametrize("end", ["tokenizer", "model"])
def test_stops_at_an_end_token(model, tokenizer, end):
    ids = tokenizer.encode("Hello")
    new = greedy(model, ids, 12)[len(ids) :]
    stop = next(i for i in range(1, 12) if new[i] not in new[:i])
    if end == "model":
        model.generation_config.eos_token_id = [new[stop], 5]
    else:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(new[stop])
    text = generate_text(model, tokenizer, "Hello", max_new_tokens=12, chat=False, stream=False)
    assert text in (tokenizer.decode(new[:stop]), tokenizer.decode(new[: stop + 1]))


def test_settings_of_the_model_do_not_leak_into_greedy_writing(model, tokenizer, recwarn):
    expected = generate_text(model, tokenizer, "Hello", max_new_tokens=12, stream=False)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=50, top_p=0.9)
    assert generate_text(model, tokenizer, "Hello", max_new_tokens=12, stream=False) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_but_the_temperature_changes_what_is_likely(model, tokenizer, temperature, recwarn):
    """Penalties and cuts of the model's own, and transformers' default of the best 50, would."""
    seen = []
    model.generation_config.update(repetition_penalty=2.0, top_k=3, top_p=0.5, no_repeat_ngram_size=2)
    prepare = model._get_logits_processor

    def noted(*args, **kwargs):
        seen.append(prepare(*args, **kwargs))
        return seen[-1]

    model._get_logits_processor = noted
    generate_text(model, tokenizer, "Hello", max_new_tokens=3, temperature=temperature, stream=False)
    assert [type(one).__name__ for one in seen[0]] == []
    assert not list(recwarn)


def test_temperature_samples(model, tokenizer):
    texts = set()
    for seed in range(3):
        torch.manual_seed(seed)
        texts.add(generate_text(model, tokenizer, "Hello", max_new_tokens=12, temperature=1.0, stream=False))
    assert len(texts) == 3
    torch.manual_seed(0)
    assert generate_text(model, tokenizer, "Hello", max_new_tokens=12, temperature=1.0, stream=False) in texts


def test_empty_prompt_starts_from_the_end_token(model, tokenizer):
    ids = greedy(model, [tokenizer.eos_token_id], 5)
    text = generate_text(model, tokenizer, "", max_new_tokens=5, chat=False, stream=False)
    assert text == tokenizer.decode(ids[1:], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ("Hello", {"max_new_tokens": 0}, "max_new_tokens"),
        ("Hello", {"temperature": -1.0}, "temperature"),
        ("Hello", {"temperature": float("nan")}, "temperature"),
        ("x" * 2000, {"max_new_tokens": 100, "chat": False}, "2000 tokens and max_new_tokens 100 exceed .* 2048"),
    ],
)
def test_settings_out_of_range(model, tokenizer, prompt, settings, words):
    with pytest.raises(UserError, match=words):
        generate_text(model, tokenizer, prompt, **settings)


def test_chat_without_a_template(model, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        generate_text(model, tokenizer, "Hello", chat=True)
    assert generate_text(model, tokenizer, "Hello", max_new_tokens=3, stream=False)


def test_by_name(tokenizer):
    expected = generate_text(load_model("tiny-llama"), tokenizer, "Hello", max_new_tokens=4, stream=False)
    assert generate("tiny-llama", "Hello", max_new_tokens=4, stream=False) == expected
