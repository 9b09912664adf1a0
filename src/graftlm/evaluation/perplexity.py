"""Perplexity of a text file, by lm-evaluation-harness's rolling log-likelihood."""

import importlib.metadata
import logging
import math
import re
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftlm.errors import UserError
from graftlm.evaluation.harness import harness_model
from graftlm.evaluation.request_cache import RequestCache
from graftlm.models import context_of
from graftlm.training.config import SourceConfig
from graftlm.training.data.readers import check_characters
from graftlm.training.data.sources import iterate_rows

logger = logging.getLogger(__name__)

LOGITS_AT_MOST = 2 * 2**30
"""Bytes of one sequence's float32 logits (context * vocabulary) that a context chosen by us may need."""


def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    limit: int | None = None,
    max_length: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
    answers: RequestCache | None = None,
) -> dict[str, Any]:
    """Score every token of the documents in `path` once, each document on its own, and say how surprising they were.

    `path`: .txt (the file is one document), .jsonl or .parquet (column `text`, one document a row); `limit`: only the
    first so many documents, which are held in memory. `max_length`: tokens of context (None: the model's, or less where
    its logits would take more than 2 GiB). Texts get no special tokens of the tokenizer's own; the harness scores a
    document's first token after the BOS token (EOS where there is none), cuts the document into disjoint windows of
    `max_length`, and gives each later window only the token before it as context (the last, shorter one as many as fill
    it up). So numbers compare only at the same `max_length`.

    Returns loss (nats per token), token_perplexity = exp(loss), word_perplexity = exp(total nats / words) where words
    are what white space separates (as the harness counts them for WikiText; None where it overflows, as for text
    written without spaces), tokens (scored), words, documents, max_length, batch_size, lm_eval (its version).
    `answers`: where windows that were scored are looked up and kept.

    Raises UserError for a file that cannot be read or has no token, a `max_length` beyond the model's context, and a
    model that gives NaN. The model and tokenizer are left as they were.
    """
    documents = _read_documents(path, limit)
    max_length = _context_length(model, max_length)
    windows = max(1, _affordable_tokens(model) // max_length)  # how many at a time changes a number by rounding alone
    at_once = min(batch_size, windows)
    settings: dict[str, Any] = {"max_length": max_length, "batch_size": at_once, "add_bos_token": False}
    with harness_model(model, tokenizer, **settings, progress=progress, answers=answers) as lm:
        lengths = [len(lm.tok_encode(document)) for document in documents]
        documents = [document for document, length in zip(documents, lengths, strict=True) if length]
        if not documents:
            raise UserError(f"{path}: no token to score; give a file with text")
        requests = [
            Instance(request_type="loglikelihood_rolling", doc={}, arguments=(document,), idx=index)
            for index, document in enumerate(documents)
        ]
        total = sum(lm.loglikelihood_rolling(requests))
    if not math.isfinite(total):
        raise UserError(f"{path}: the model's log-likelihood is {total}; its weights or its dtype are broken")
    tokens = sum(lengths)
    words = sum(len(re.split(r"\s+", document)) for document in documents)
    return {
        "token_perplexity": _exp(-total / tokens),
        "word_perplexity": _exp(-total / words),
        "loss": -total / tokens,
        "tokens": tokens,
        "words": words,
        "documents": len(documents),
        "max_length": max_length,
        "batch_size": batch_size,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }


def _read_documents(path: str | Path, limit: int | None) -> list[str]:
    """The texts of a file; long ones come from the reader in pieces and are put together again."""
    source = SourceConfig(path=str(path), format="text", limit=limit)
    documents: list[str] = []
    pieces: list[str] = []
    for row in iterate_rows(source):
        text = row.fields.get(source.text_field)
        if not isinstance(text, str):
            raise UserError(f"{row.where}: no text in a column {source.text_field}, which --perplexity reads")
        check_characters(text, row.where)
        pieces.append(text)
        if row.last:
            documents.append("".join(pieces))
            pieces = []
    return documents


def _affordable_tokens(model: PreTrainedModel) -> int:
    """Whose logits take LOGITS_AT_MOST in all."""
    return LOGITS_AT_MOST // (4 * int(model.config.get_text_config().vocab_size))


def _context_length(model: PreTrainedModel, asked: int | None) -> int:
    longest = context_of(model)
    if asked is not None:
        if asked < 1 or (longest is not None and asked > longest):
            raise UserError(f"max_length: {asked} is not from 1 to {longest or 'any number'}, the model's context")
        return asked
    affordable = _affordable_tokens(model)
    if longest is not None and longest <= affordable:
        return longest
    logger.warning("max_length: %d tokens, to save memory; set max_length for the model's whole context", affordable)
    return affordable


def _exp(value: float) -> float | None:
    try:
        return math.exp(value)
    except OverflowError:
        return None
