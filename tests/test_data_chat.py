"""The assistant mask covers exactly what the assistant says, its end-of-turn token included."""

import datetime

import pytest
from test_data_support import CHATML, CHATML_MARKED, byte_tokenizer
from transformers import ByT5Tokenizer

from graftlm.errors import UserError
from graftlm.training.data.cache import tokenizer_fingerprint
from graftlm.training.data.chat import ChatEncoder
from graftlm.training.data.formats import Conversation

TURNS = [
    {"role": "system", "content": "Be kind"},
    {"role": "user", "content": "Hi ü"},
    {"role": "assistant", "content": "Hello ✓"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long "},
]
WANTED = ["Hello ✓<|im_end|>", "So long <|im_end|>"]


def encode(tokenizer, turns, tools=None):
    return ChatEncoder(tokenizer).encode([Conversation(turns, tools, 0, "data.jsonl:7")])[0]


def supervised_runs(tokenizer, ids, mask):
    runs, run = [], []
    for token, keep in zip([*ids.tolist(), 0], [*mask.tolist(), False], strict=True):
        if keep:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["by prefix", "by marker"])
def test_assistant_spans_are_exact(template):
    tokenizer = byte_tokenizer(template, merges=(("H", "e"), ("l", "o"), ("Ġ", "l")))
    ids, mask = encode(tokenizer, TURNS)
    assert supervised_runs(tokenizer, ids, mask) == WANTED
    assert tokenizer.decode(ids.tolist()) == tokenizer.apply_chat_template(TURNS, tokenize=False)


def test_markers_and_prefixes_agree_in_a_batch():
    marked, plain = (ChatEncoder(byte_tokenizer(template)) for template in (CHATML_MARKED, CHATML))
    assert marked.marked and not plain.marked
    batch = [Conversation(TURNS, None, 0, ""), Conversation(TURNS[1:3], None, 1, "")]
    for (ids, mask), (other_ids, other_mask) in zip(marked.encode(batch), plain.encode(batch), strict=True):
        assert ids.tolist() == other_ids.tolist() and mask.tolist() == other_mask.tolist()


def test_white_space_at_the_start_of_a_marked_span_is_no_trouble():
    template = CHATML_MARKED.replace(
        "message['content'] + '<|im_end|>' }}{% endg", "' ' + message['content'] + '<|im_end|>' }}{% endg"
    )
    tokenizer = byte_tokenizer(template)
    ids, mask = encode(tokenizer, TURNS)
    assert supervised_runs(tokenizer, ids, mask) == [" " + want for want in WANTED]


def test_template_that_rewrites_earlier_turns_is_refused():
    rewriting = CHATML.replace(
        "message['content'] +", "(message['content'] if loop.last else message['content'][:2]) +"
    )
    with pytest.raises(UserError, match=r"data\.jsonl:7.*generation"):
        encode(byte_tokenizer(rewriting), TURNS)


def test_templates_that_write_the_date_do_not_depend_on_the_day():
    """As those of Llama 3.2 do; and data prepared with another day's are not found in the cache."""
    dated = "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{{ day + '/' }}{% endif %}"
    for template in (CHATML, CHATML_MARKED):
        tokenizer = byte_tokenizer("\n" + dated + template)
        ids, mask = encode(tokenizer, TURNS)
        assert tokenizer.decode(ids).startswith("\n26 Jul 2024/<|im_start|>")
        assert supervised_runs(tokenizer, ids, mask) == WANTED
        today = tokenizer.apply_chat_template(TURNS, tokenize=False)
        assert len(today) == len(tokenizer.decode(ids)) and today.endswith(tokenizer.decode(ids)[20:])
    before = tokenizer_fingerprint(tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graftlm.training.data.cache.TEMPLATE_DATE", datetime.datetime(2025, 1, 1))
        assert tokenizer_fingerprint(tokenizer) != before
        undated = byte_tokenizer(CHATML)
        there = tokenizer_fingerprint(undated)
    assert tokenizer_fingerprint(undated) == there


def test_markers_without_end_of_turn_are_refused():
    short = CHATML_MARKED.replace(
        "message['content'] + '<|im_end|>' }}{% endgeneration %}", "message['content'] }}{% endgeneration %}<|im_end|>"
    )
    with pytest.raises(UserError, match=r"end-of-turn token <\|im_end\|>"):
        ChatEncoder(byte_tokenizer(short))


def test_missing_template_and_refusing_template():
    with pytest.raises(UserError, match="chat_template: chatml"):
        ChatEncoder(byte_tokenizer(None))
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r"data\.jsonl:7: .*no system"):
        encode(byte_tokenizer(refusing), TURNS)


def test_opening_assistant_message_is_not_supervised():
    tokenizer = byte_tokenizer()
    ids, mask = encode(tokenizer, [{"role": "assistant", "content": "Welcome"}, *TURNS[1:3]])
    assert supervised_runs(tokenizer, ids, mask) == WANTED[:1]


def test_tokenizer_without_offsets():
    tokenizer = ByT5Tokenizer(extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML_MARKED
    assert not tokenizer.is_fast
    ids, mask = encode(tokenizer, TURNS)
    assert supervised_runs(tokenizer, ids, mask) == WANTED


def test_tools_reach_the_template():
    tokenizer = byte_tokenizer("{% for tool in tools %}{{ tool['name'] }}{% endfor %}" + CHATML)
    ids, _ = encode(tokenizer, TURNS, tools=[{"name": "search"}])
    assert tokenizer.decode(ids.tolist()).startswith("search<|im_start|>")


def test_a_prompt_that_later_turns_do_not_have_is_refused():
    """As Qwen3's, whose prompt for an answer may open a thought that the finished turn has not."""
    prompt = "{% if add_generation_prompt %}"
    assert prompt in CHATML
    begin, _, end = CHATML.rpartition(prompt)
    thinking = begin + prompt + "{{ '<think>' }}" + end
    with pytest.raises(UserError):
        encode(byte_tokenizer(thinking), TURNS)
