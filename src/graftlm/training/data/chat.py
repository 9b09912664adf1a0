"""From conversations to token ids and the mask of what the assistant says.

A conversation is rendered once as text, tokenised once, and the assistant's spans are found in characters. The spans
come from the template's {% generation %} markers (its own, or those that TRL has for a known template); without
markers from rendering prefixes of the conversation, which is exact or refused, never guessed.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from graftlm.errors import UserError
from graftlm.training.data.formats import TEMPLATE_DATE, Conversation
from graftlm.training.data.messages import with_stand_ins

Span = tuple[int, int]
"""Start and end in characters of the rendered conversation."""
Tokens = tuple[np.ndarray, np.ndarray]
"""input_ids int32 [n] and the assistant mask bool [n]."""

TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError)
"""What a template raises that does not like its messages."""
REWRITES = (
    "the chat template renders earlier turns differently once later ones follow (it strips thinking, say), so the "
    "assistant's tokens cannot be found; set chat_template to a Jinja file with {% generation %} markers"
)


SAME_DAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('%{code}', '{TEMPLATE_DATE.strftime('%' + code)}')" for code in "aAbBdjmyYHIMSp")
    + " }}{%- endmacro +%}"
)
"""Before a template that asks for today, in the place of transformers' function: data must not depend on the day."""


@dataclass(frozen=True)
class Template:
    """A chat template as it is rendered here."""

    text: str
    marked: bool
    """The assistant's spans are those of its {% generation %} markers."""


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template.

    Raises UserError where the tokenizer has no chat template, or has markers that leave out the end-of-turn token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                "chat_template: the model's tokenizer has none, and the data are conversations; set chat_template: "
                "chatml, or to a Jinja file"
            )
        self.tokenizer = tokenizer
        self._added = set(tokenizer.get_added_vocab())
        self._templates: dict[str, Template] = {}
        if isinstance(tokenizer.chat_template, str):
            self.template_of(None)  # so that what is wrong with it is said before a row is read

    def template_of(self, tools: list[dict[str, Any]] | None) -> Template:
        """Of a conversation with these tools: a tokenizer may have several templates, one of them for tools."""
        try:
            given = self.tokenizer.get_chat_template(tools=tools)
        except ValueError as error:
            names = ", ".join(sorted(self.tokenizer.chat_template))
            raise UserError(
                f"chat_template: the tokenizer has several ({names}) and no default; set chat_template to a Jinja file"
            ) from error
        if given not in self._templates:
            self._templates[given] = self._prepared(given)
            if self._templates[given].marked:
                self._check_end_of_turn(tools)
        return self._templates[given]

    def _prepared(self, template: str) -> Template:
        if not has_generation_markers(template):
            single = copy.copy(self.tokenizer)
            single.chat_template = template
            # ValueError: a template that TRL does not know, so prefixes it is. TRL tries it on messages of its own,
            # which a template may refuse in other ways.
            with contextlib.suppress(*TEMPLATE_ERRORS):
                template = get_training_chat_template(single) or template
        if "strftime_now" in template:
            template = SAME_DAY + template
        # transformers finds marked spans with character offsets, which only fast tokenizers give.
        return Template(template, has_generation_markers(template) and self.tokenizer.is_fast)

    def encode(self, conversations: Sequence[Conversation]) -> list[Tokens]:
        """Ids and assistant masks of a batch. Raises UserError that names the conversation's file and line."""
        return self._tokens([self._rendered(conversation) for conversation in conversations], conversations)

    def _tokens(self, found: Sequence[tuple[str, list[Span]]], conversations: Sequence[Conversation]) -> list[Tokens]:
        if not self.tokenizer.is_fast:
            return [
                self._mask_by_tokens(*item, conversation)
                for item, conversation in zip(found, conversations, strict=True)
            ]
        batch = self.tokenizer(
            [text for text, _ in found],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        return [
            (np.asarray(ids, np.int32), _mask(np.asarray(offsets).reshape(-1, 2), *item, conversation.where))
            for ids, offsets, item, conversation in zip(
                batch["input_ids"], batch["offset_mapping"], found, conversations, strict=True
            )
        ]

    def _rendered(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text, and the spans of what is learnt of it."""
        marked = self.template_of(conversation.tools).marked
        text, spans = (self._spans_by_marker if marked else self._spans_by_prefix)(conversation)
        self._check_tools(conversation, text)
        return text, spans

    def _render(
        self, conversation: Conversation, messages: list[dict[str, Any]], *, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text of messages (prompt: with the generation prompt behind) and the marked spans, [] without markers."""
        template = self.template_of(conversation.tools)
        options: dict[str, Any] = {
            **self.tokenizer.special_tokens_map,
            "conversations": [messages],
            "tools": conversation.tools,
            "chat_template": template.text,
            "add_generation_prompt": prompt,
            "return_assistant_tokens_mask": template.marked,
        }
        try:
            rendered: Any = render_jinja_template(**options)
        except TEMPLATE_ERRORS as error:
            raise UserError(
                f"{conversation.where}: the chat template refuses this conversation ({error}); mend or remove the row, "
                "or set chat_template"
            ) from error
        texts, spans = rendered
        return texts[0], spans[0] if template.marked else []

    def _spans_by_marker(self, conversation: Conversation) -> tuple[str, list[Span]]:
        text, spans = self._render(conversation, conversation.messages)
        history = conversation.messages[: conversation.first_answer]
        if any(message["role"] == "assistant" for message in history):
            before, _ = self._render(conversation, history)
            if not text.startswith(before):
                raise UserError(f"{conversation.where}: {REWRITES}")
            spans = [span for span in spans if span[0] >= len(before)]
        return text, spans

    def _check_tools(self, conversation: Conversation, text: str) -> None:
        """Refuse a conversation of which the template leaves out tools or calls: the model would learn to answer
        nothing."""
        messages, tools, names = with_stand_ins(conversation.messages, conversation.tools)
        if not names:
            return
        try:
            text, _ = self._render(dataclasses.replace(conversation, tools=tools), messages)
            missing = [named for stand_in, named in names.items() if stand_in not in text]
        except UserError:  # a template that goes by the tools' names: the real ones, though they may occur elsewhere
            missing = [named for named in names.values() if named[1] not in text]
        if missing:
            what, name = missing[0]
            raise UserError(
                f"{conversation.where}: {what} {name} is left out by the chat template of "
                f"{self.tokenizer.name_or_path or 'the tokenizer'}; set chat_template to a Jinja file that writes "
                "tools and tool_calls, or remove them from the row"
            )

    def _check_end_of_turn(self, tools: list[dict[str, Any]] | None) -> None:
        """Refuse markers that close before the end-of-turn token: a model trained so never stops talking."""
        turns = [{"role": role, "content": "word"} for role in ("user", "assistant", "user")]
        probe = Conversation(turns, tools, 0, "chat_template")
        [(ids, mask)] = self._tokens([self._render(probe, turns)], [probe])
        after = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else len(ids)
        if after == len(ids):
            return
        inside, following = self.tokenizer.decode(ids[mask]), self.tokenizer.decode(ids[after : after + 1])
        if following in self._added and not any(token in inside for token in self._added):
            raise UserError(
                f"chat_template: its generation block ends before the end-of-turn token {following}, so the model "
                "would never learn to stop; move {% endgeneration %} behind it"
            )

    def _spans_by_prefix(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The rendered text, and for every assistant message where it begins and ends.

        A turn begins where the generation prompt ends and ends with its end-of-turn token; white space that a template
        adds behind that token is left out, since the model has stopped by then. An assistant message that opens the
        conversation answers nothing, and one of a prompt's history is no answer to learn: they are not supervised.
        """
        messages = conversation.messages
        text, _ = self._render(conversation, messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i < max(1, conversation.first_answer):
                continue
            before, _ = self._render(conversation, messages[:i], prompt=True)
            through = text if i + 1 == len(messages) else self._render(conversation, messages[: i + 1])[0]
            if not (text.startswith(through) and through.startswith(before)):
                raise UserError(f"{conversation.where}: {REWRITES}")
            stripped = through.rstrip()
            end = len(stripped) if any(stripped.endswith(token) for token in self._added) else len(through)
            spans.append((len(before), max(end, len(before))))
        return text, spans

    def _mask_by_tokens(self, text: str, spans: list[Span], conversation: Conversation) -> Tokens:
        """Tokenizers without offsets: the tokens of a prefix of the text must be a prefix of its tokens."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        mask = np.zeros(len(ids), bool)
        for span in spans:
            cuts = []
            for end in span:
                prefix = self.tokenizer(text[:end], add_special_tokens=False)["input_ids"] if end else []
                if ids[: len(prefix)] != prefix:
                    raise UserError(
                        f"{conversation.where}: this tokenizer merges text across the border of an assistant turn, and "
                        "it gives no offsets; use its fast version"
                    )
                cuts.append(len(prefix))
            mask[cuts[0] : cuts[1]] = True
        return np.asarray(ids, np.int32), mask


def _mask(offsets: np.ndarray, text: str, spans: list[Span], where: str) -> np.ndarray:
    """Which tokens, by their first and last characters [n, 2], lie in a span.

    One that takes in white space before a span (a prompt that ends in a space, an answer's first word) is learnt whole:
    the answer would lack its beginning otherwise. UserError where it takes in more of the prompt.
    """
    starts, ends = offsets.T
    mask = np.zeros(len(offsets), bool)
    for start, end in spans:
        if start == end:
            continue
        # A token of no width at the border is the prompt's: a space, which some tokenizers trim off their offsets.
        inside = (starts < end) & (ends > start)
        for first in starts[inside & (starts < start)]:
            if text[first:start].strip():
                raise UserError(
                    f"{where}: the tokenizer merges the prompt's {text[first:start]!r} with the answer's first word; "
                    "put the border at white space or at a special token (in the chat template, or in the row)"
                )
        mask |= inside
    return mask
