"""From conversations to token ids and the mask of what the assistant says.

A conversation is rendered once as text, tokenised once, and the assistant's spans are found in characters. The spans
come from the template's {% generation %} markers (its own, or those that TRL has for a known template); without
markers from rendering prefixes of the conversation, which is exact or refused, never guessed.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from graftlm.errors import UserError
from graftlm.training.data.formats import TEMPLATE_DATE, Conversation

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
        self.template = tokenizer.get_chat_template()
        self._added = set(tokenizer.get_added_vocab())
        if not has_generation_markers(self.template):
            # ValueError: a template that TRL does not know, so prefixes it is. TRL tries it on messages of its own,
            # which a template may refuse in other ways.
            with contextlib.suppress(*TEMPLATE_ERRORS):
                self.template = get_training_chat_template(tokenizer) or self.template
        if "strftime_now" in self.template:
            self.template = SAME_DAY + self.template
        # transformers finds marked spans with character offsets, which only fast tokenizers give.
        self.marked = has_generation_markers(self.template) and tokenizer.is_fast
        if self.marked:
            self._check_end_of_turn()

    def encode(self, conversations: Sequence[Conversation]) -> list[Tokens]:
        """Ids and assistant masks of a batch. Raises UserError that names the conversation's file and line."""
        find = self._spans_by_marker if self.marked else self._spans_by_prefix
        found = [find(conversation) for conversation in conversations]
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
            (np.asarray(ids, np.int32), _mask(np.asarray(offsets).reshape(-1, 2)[:, 0], spans))
            for ids, offsets, (_, spans) in zip(batch["input_ids"], batch["offset_mapping"], found, strict=True)
        ]

    def _render(
        self, conversation: Conversation, messages: list[dict[str, Any]], *, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text of messages (prompt: with the generation prompt behind) and the marked spans, [] without markers."""
        options: dict[str, Any] = {
            **self.tokenizer.special_tokens_map,
            "conversations": [messages],
            "tools": conversation.tools,
            "chat_template": self.template,
            "add_generation_prompt": prompt,
            "return_assistant_tokens_mask": self.marked,
        }
        try:
            rendered: Any = render_jinja_template(**options)
        except TEMPLATE_ERRORS as error:
            raise UserError(
                f"{conversation.where}: the chat template refuses this conversation ({error}); mend or remove the row, "
                "or set chat_template"
            ) from error
        texts, spans = rendered
        return texts[0], spans[0] if self.marked else []

    def _spans_by_marker(self, conversation: Conversation) -> tuple[str, list[Span]]:
        return self._render(conversation, conversation.messages)

    def _check_end_of_turn(self) -> None:
        """Refuse markers that close before the end-of-turn token: a model trained so never stops talking."""
        turns = [{"role": role, "content": "word"} for role in ("user", "assistant", "user")]
        [(ids, mask)] = self.encode([Conversation(turns, None, 0, "chat_template")])
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
        conversation answers nothing: it is not supervised.
        """
        messages = conversation.messages
        text, _ = self._render(conversation, messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == 0:
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


def _mask(starts: np.ndarray, spans: list[Span]) -> np.ndarray:
    """Which tokens, by their first character [n], lie in a span."""
    mask = np.zeros(len(starts), bool)
    for start, end in spans:
        mask |= (starts >= start) & (starts < end)
    return mask
