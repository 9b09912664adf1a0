"""lm-evaluation-harness over a model that is already in memory: the one way in which this project evaluates.

What it yields goes to `lm.loglikelihood_rolling(...)` (perplexity) as well as to `lm_eval.simple_evaluate(model=lm)`.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftlm.models import check_vocabulary, quiet_transformers


class HarnessModel(HFLM):
    """The harness's own Hugging Face model, with a way to hear how far it is."""

    on_scored: Callable[[int], Any] | None = None
    """Called with the number of tokens scored after each pass; takes the place of the harness's progress bar, which it
    would otherwise start anew for every batch of windows."""

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        quiet = disable_tqdm or self.on_scored is not None
        results = super()._loglikelihood_tokens(requests, disable_tqdm=quiet, override_bs=override_bs)
        if self.on_scored is not None:
            self.on_scored(sum(len(continuation) for _, _, continuation in requests))
        return results


@contextlib.contextmanager
def harness_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    batch_size: int = 1,
    add_bos_token: bool | None = None,
) -> Iterator[HarnessModel]:
    """Yield `model` wrapped for the harness, on the device and in the dtype it has.

    `max_length`: tokens of context (None: the model's). `batch_size`: sequences a pass. `add_bos_token`: whether texts
    get the tokenizer's special tokens (None: as the tokenizer does by default). Meanwhile the model is in evaluation
    mode; afterwards every module is in the mode it was in. The tokenizer is not changed.
    Raises UserError when the tokenizer has more tokens than the model.
    """
    check_vocabulary(model, tokenizer)
    modes = [(module, module.training) for module in model.modules()]
    if tokenizer.pad_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)  # the harness would give the caller's one a pad token
    try:
        with quiet_transformers(), _quiet_harness():
            yield HarnessModel(
                pretrained=model,
                tokenizer=tokenizer,  # type: ignore[arg-type]
                max_length=max_length,
                batch_size=batch_size,
                add_bos_token=add_bos_token,
                # In 16 bits a log-probability of -10 is off by up to 0.03: sums over a book would be noise.
                softmax_dtype="float32" if model.dtype.itemsize < 4 else None,
            )
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _quiet_harness() -> Iterator[None]:
    """The harness warns of every model that it has not loaded itself."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
