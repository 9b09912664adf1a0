"""The assistant mask covers exactly what the assistant says, its end-of-turn token included."""

import datetime
from pathlib import Path

import pytest
import trl
from test_data_support import CHATML, CHATML_MARKED, byte_tokenizer
from transformers import ByT5Tokenizer

from graftlm.errors import UserError
from graftlm.training.data.cache import tokenizer_fingerprint
from graftlm.training.data.chat import ChatEncoder
from graftlm.training.data.formats import Conversation
from graftlm.training.data.messages import checked_messages

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
    assert marked.template_of(None).marked and not plain.template_of(None).marked
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


CALLS = [
    {"role": "user", "content": "What is the weather?"},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]},
    {"role": "tool", "content": "21C"},
    {"role": "assistant", "content": "It is 21C."},
]
SCHEMAS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def trl_template(name):
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def test_tools_and_calls_that_a_template_leaves_out_are_refused():
    """Told apart from a word of the text that is the name, and from a call's name among the tools."""
    messages = checked_messages(CALLS, "data.jsonl:7")
    for template in (CHATML, CHATML_MARKED, "{{ tools | tojson if tools }}" + CHATML):
        with pytest.raises(
            UserError, match=r"data\.jsonl:7: message 2: the call of weather is left out by the chat tem"
        ):
            encode(byte_tokenizer(template), messages, SCHEMAS)
    with pytest.raises(UserError, match="the tool weather is left out"):
        encode(byte_tokenizer(), TURNS, SCHEMAS)
    tokenizer = byte_tokenizer(trl_template("qwen2_5"))
    ids, mask = encode(tokenizer, messages, SCHEMAS)
    assert '{"name": "weather", "arguments": {}}' in supervised_runs(tokenizer, ids, mask)[0]


def test_a_template_that_knows_its_tools_by_name_is_asked_for_the_real_ones():
    known = (
        "{% for tool in tools %}{{ tool['name'] if tool['name'] == 'search' else raise_exception('?') }}{% endfor %}"
    )
    encode(byte_tokenizer(known + CHATML), TURNS, tools=[{"name": "search"}])


SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + ' A: ' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
SPACED_MARKED = SPACED.replace(
    "{{ m['content'] + eos_token }}", "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
)


@pytest.mark.parametrize("template", [SPACED, SPACED_MARKED], ids=["by prefix", "by marker"])
def test_a_first_token_that_takes_in_the_prompts_last_space_is_learnt(template):
    turns = [{"role": "user", "content": "capital?"}, {"role": "assistant", "content": "Paris"}]
    tokenizer = byte_tokenizer(template, merges=(("Ġ", "P"), ("a", "r"), ("ĠP", "ar")))
    ids, mask = encode(tokenizer, turns)
    assert supervised_runs(tokenizer, ids, mask) == [" Paris<|endoftext|>"]
    merged = byte_tokenizer(template.replace(" A: ", " A:"), merges=((":", "P"),))
    with pytest.raises(UserError, match=r"data\.jsonl:7: the tokenizer merges the prompt's ':' with"):
        encode(merged, turns)


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["by prefix", "by marker"])
def test_answers_of_a_prompts_history_are_not_learnt(template):
    tokenizer = byte_tokenizer(template)
    [(ids, mask)] = ChatEncoder(tokenizer).encode([Conversation(TURNS, None, 0, "", first_answer=4)])
    assert supervised_runs(tokenizer, ids, mask) == WANTED[1:]


def test_a_history_that_is_rendered_otherwise_is_refused():
    rewriting = CHATML_MARKED.replace(
        "{% generation %}{{ message['content'] +",
        "{% generation %}{{ (message['content'] if loop.last else message['content'][:2]) +",
    )
    encoder = ChatEncoder(byte_tokenizer(rewriting))
    with pytest.raises(UserError, match=r"data\.jsonl:7.*renders earlier turns differently"):
        encoder.encode([Conversation([*TURNS[1:3], *TURNS[3:]], None, 0, "data.jsonl:7", first_answer=2)])


def test_named_templates_are_chosen_by_the_tools():
    tokenizer = byte_tokenizer({"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML_MARKED})
    for tools, marked in ((None, False), (SCHEMAS, True)):
        ids, mask = encode(tokenizer, TURNS, tools)
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(TURNS, tools=tools, tokenize=False)
        assert supervised_runs(tokenizer, ids, mask) == WANTED
        assert ChatEncoder(tokenizer).template_of(tools).marked is marked
    with pytest.raises(UserError, match=r"^chat_template: .*\(rag, tool_use\) and no default"):
        encode(byte_tokenizer({"rag": CHATML, "tool_use": CHATML}), TURNS)
