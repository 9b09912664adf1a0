"""lm-evaluation-harness over a model that is already in memory: the one way in which this project evaluates.

What it yields goes to `lm.loglikelihood_rolling(...)` (perplexity) as well as to `lm_eval.simple_evaluate(model=lm)`.
"""

import contextlib
import copy
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftlm.errors import UserError
from graftlm.evaluation.request_cache import RequestCache
from graftlm.models import check_vocabulary, context_of
from graftlm.progress import update_interval
from graftlm.quiet import quiet_loggers, quiet_transformers


class HarnessModel(HFLM):
    """The harness's own Hugging Face model, with one progress bar and answers that survive a kill."""

    show_progress = False
    """Draw one bar a kind of request, in place of the harness's own, which would start anew for every batch."""
    answers: RequestCache | None = None
    """Where answers are looked up and kept."""
    sampling_seed: int | None = None
    """Of texts that are sampled: each batch's draws follow from it and from how many texts came before, in this process
    or in one that was killed. None: from the state of torch's generator."""
    _bar: tqdm | None = None
    _written = 0
    """Texts there are of what was asked, kept ones included."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.asked: Counter[str | None] = Counter()
        """Prompts, by task."""
        self.cut: Counter[str | None] = Counter()
        """Those of them that were longer than the context and lost their beginning."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers = [tuple(answer) for answer in self._answer("loglikelihood", requests, super().loglikelihood)]
        if any(math.isnan(score) for score, _ in answers):
            raise UserError("the model's log-likelihood is nan; its weights or its dtype are broken")
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._answer("generate_until", requests, super().generate_until)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        tokens = sum(len(self.tok_encode(*request.args)) for request in requests)
        with self._progress("perplexity", "tokens", tokens):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def add_partial(self, kind: str, arguments: tuple[Any, ...], answer: Any) -> None:
        """Called by the harness with each answer as soon as it is there; this model is its own cache hook."""
        if kind == "loglikelihood_rolling":  # kept by the window, below
            return
        if self.answers is not None:
            self.answers.add(kind, arguments, answer)
        self._written += kind == "generate_until"
        if self._bar is not None:
            self._bar.update()

    def notes_on_cut(self, task: str | None) -> list[str]:
        """What somebody who reads a task's numbers must know of its prompts' lengths."""
        if not self.cut[task]:
            return []
        return [
            f"{self.cut[task]} of {self.asked[task]} prompts are longer than the context ({self.max_length} tokens, "
            "with what is to be written) and lose their beginning, examples first"
        ]

    def _count(self, request: Instance) -> None:
        """Count a prompt, and whether the harness cuts it, which it says in its log alone."""
        self.asked[request.task_name] += 1
        first, second = request.args
        room = self.max_length + 1  # nothing follows the last token of a choice
        if isinstance(second, str):
            text = first + second
            if len(second.encode()) > self.max_length and len(self.tok_encode(second)) > self.max_length:
                raise UserError(
                    f"{request.task_name}: a choice is longer than the context of {self.max_length} tokens; give a "
                    "larger max_length, or leave the task out"
                )
        else:
            text, room = first, self.max_length - second.get("max_gen_toks", self.max_gen_toks)
        # A token is a byte at least, so most prompts need not be taken apart to know that they fit.
        if len(text.encode()) >= room and len(self.tok_encode(text)) > room:
            self.cut[request.task_name] += 1

    def _answer(self, kind: str, requests: list[Instance], compute: Callable[..., list[Any]]) -> list[Any]:
        for request in requests:
            self._count(request)
        kept = [None if self.answers is None else self.answers.take(kind, request.args) for request in requests]
        missing = [request for request, answer in zip(requests, kept, strict=True) if answer is None]
        self._written = len(requests) - len(missing)
        with self._progress(kind, "requests", len(requests), done=len(requests) - len(missing)):
            fresh = iter(compute(missing, disable_tqdm=True) if missing else [])
        return [next(fresh) if answer is None else answer for answer in kept]

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if any(name is not None for name, _, _ in requests):
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        # A batch of a document's windows: all of it from what was kept, or none, so that batches stay what they were.
        windows = [window for _, *window in requests]
        kept: list[Any] = [None if self.answers is None else self.answers.take("window", window) for window in windows]
        if any(answer is None for answer in kept):
            kept = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            for window, answer in zip(windows, kept, strict=True):
                if self.answers is not None:
                    self.answers.add("window", window, answer)
        if self._bar is not None:
            self._bar.update(sum(len(continuation) for _, continuation in windows))
        return [tuple(answer) for answer in kept]

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        self._flush()
        return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        self._flush()
        if self.sampling_seed is None:
            return super()._model_generate(*args, **kwargs)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(random.Random(f"{self.sampling_seed}/{self._written}").getrandbits(63))
            return super()._model_generate(*args, **kwargs)

    def _flush(self) -> None:
        if self.answers is not None:
            self.answers.flush()

    @contextlib.contextmanager
    def _progress(self, what: str, unit: str, total: int, done: int = 0) -> Iterator[None]:
        shown = self.show_progress
        often = update_interval()
        with tqdm(
            total=total, initial=done, unit=f" {unit}", desc=what, disable=not shown, mininterval=often
        ) as self._bar:
            try:
                yield
            finally:
                self._bar = None
        self._flush()  # not after an interrupt: half a batch must not be kept


@contextlib.contextmanager
def harness_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    batch_size: int = 1,
    add_bos_token: bool | None = None,
    progress: bool = False,
    answers: RequestCache | None = None,
) -> Iterator[HarnessModel]:
    """Yield `model` wrapped for the harness, on the device and in the dtype it has.

    `max_length`: tokens of context (None: the model's). `batch_size`: sequences a pass. `add_bos_token`: whether texts
    get the tokenizer's special tokens (None: as the tokenizer does by default). `progress`: draw bars. `answers`: a
    cache to take answers from and keep them in. Meanwhile the model is in evaluation mode; afterwards every module is
    in the mode it was in. The tokenizer is not changed.
    Raises UserError when the tokenizer has more tokens than the model, and for a context above the model's.
    """
    check_vocabulary(model, tokenizer)
    context = context_of(model)
    if max_length is not None and context is not None and max_length > context:
        raise UserError(f"max_length: {max_length} is above the model's context of {context} tokens")
    modes = [(module, module.training) for module in model.modules()]
    if tokenizer.pad_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)  # the harness would give the caller's one a pad token
    try:
        with quiet_transformers(), quiet_harness():
            lm = HarnessModel(
                pretrained=model,
                tokenizer=tokenizer,  # type: ignore[arg-type]
                max_length=max_length,
                batch_size=batch_size,
                add_bos_token=add_bos_token,
                # In 16 bits a log-probability of -10 is off by up to 0.03: sums over a book would be noise.
                softmax_dtype="float32" if model.dtype.itemsize < 4 else None,
            )
            lm.set_cache_hook(lm)  # type: ignore[arg-type]
            lm.show_progress = progress
            lm.answers = answers
            yield lm
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Only errors are logged: the harness warns of every model that it has not loaded itself and of every shot count
    that is not a task's own, the Hub's library of each time it tries again."""
    with quiet_loggers("lm_eval", "huggingface_hub"):
        yield
