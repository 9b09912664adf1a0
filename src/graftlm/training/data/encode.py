"""Documents -> token ids with a mask of what counts in the loss, in batches that keep the tokeniser's threads busy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from graftlm.errors import UserError
from graftlm.training.data.chat import ChatEncoder
from graftlm.training.data.formats import Conversation, TextDocument

BATCH_CHARACTERS = 2**19
"""Characters tokenised at once: about 130 thousand tokens, whose objects take some tens of MB."""
BATCH_DOCUMENTS = 1024

D = TypeVar("D", TextDocument, Conversation)


@dataclass(frozen=True)
class Encoded:
    """The tokens of a document, or of one piece of a long text."""

    input_ids: np.ndarray
    """int32 [n]"""
    supervised: np.ndarray | None
    """bool [n]: what counts in the loss; None: everything."""
    index: int
    """Number of the document in its source."""
    first: bool = True
    last: bool = True


def encode_texts(documents: Iterator[TextDocument], tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
    """Tokens of texts: [bos, if the tokenizer adds one] text eos.

    Pieces of one long text are tokenised on their own, so up to one token at their border may differ from those of
    the whole.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(
            "model: its tokenizer has no end-of-sequence token to put between documents; give it an eos_token"
        )
    empty = tokenizer("")["input_ids"]  # only what the tokenizer adds by itself
    prefix = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []
    for batch in _batches(documents, lambda document: len(document.text)):
        texts = [document.text for document in batch]
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for document, tokens in zip(batch, ids, strict=True):
            tokens = (prefix if document.first else []) + tokens + ([eos] if document.last else [])
            yield Encoded(np.asarray(tokens, np.int32), None, document.index, document.first, document.last)


def encode_conversations(
    conversations: Iterator[Conversation], encoder: ChatEncoder, *, assistant_only: bool
) -> Iterator[Encoded]:
    """Tokens of conversations; only the assistant's are supervised, unless assistant_only is False."""

    def characters(conversation: Conversation) -> int:
        return sum(len(message["content"]) for message in conversation.messages)

    for batch in _batches(conversations, characters):
        for conversation, (ids, mask) in zip(batch, encoder.encode(batch), strict=True):
            yield Encoded(ids, mask if assistant_only else None, conversation.index)


def _batches(documents: Iterator[D], characters) -> Iterator[Sequence[D]]:
    batch: list[D] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += characters(document)
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
