"""What a training run counts: its tokens, its seconds, the losses of its steps."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftlm.training.distributed import world_size


@dataclass(frozen=True)
class Interval:
    """What was counted between two lines of metrics.jsonl."""

    loss: float
    """Mean over the steps, in nats a token."""
    tokens_per_second: float


class Meter:
    """Counts tokens and seconds of training (evaluation and saving apart), over all processes and resumed parts."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._clock: float | None = None
        self._loss = 0.0
        """Sum of the losses of all steps."""
        self._step_loss: Tensor | None = None
        """Of the step that goes on and this process, in float64; fetched once a step, since that stalls a GPU."""
        self._step_tokens: int | Tensor = 0
        self._logged = (0, 0, 0.0, 0.0)
        """Step, tokens, seconds and sum of losses when metrics were last logged."""

    def start(self) -> None:
        """Count from now on, if time is not counted already."""
        if self._clock is None:
            self._clock = time.perf_counter()

    def stop(self, *, wait: bool = True) -> None:
        """wait: until a GPU has done what it was given; else what is left of it counts with what comes next."""
        if self._clock is not None:
            if wait and torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self._clock
            self._clock = None

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count what happens inside as time of training."""
        counting = self._clock is not None
        self.start()
        try:
            yield
        finally:
            if not counting:
                self.stop()

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Do not count what happens inside, where time is counted."""
        counting = self._clock is not None
        self.stop()
        try:
            yield
        finally:
            if counting:
                self.start()

    def add(self, tokens: int | Tensor, loss: Tensor) -> None:
        """One batch of the step that goes on, in this process; `loss` is a scalar, its part of the step's."""
        self._step_tokens = self._step_tokens + tokens
        self._step_loss = loss.double() if self._step_loss is None else self._step_loss + loss.double()

    def end_step(self, norm: Tensor) -> str | None:
        """Count the step, of all processes, with its gradients' norm (a scalar); or say what of it is NaN or Inf."""
        assert self._step_loss is not None
        found = torch.stack([self._step_loss, torch.as_tensor(self._step_tokens).to(self._step_loss)])
        if world_size() > 1:
            torch.distributed.all_reduce(found)
            found[0] /= world_size()  # Trainer scales each process's part up by their number
        loss, tokens, norm_value = torch.cat([found, norm.to(found)[None]]).tolist()
        self._step_loss, self._step_tokens = None, 0
        if not math.isfinite(loss):
            return "the loss"
        if not math.isfinite(norm_value):
            return "a gradient"
        self._loss += loss
        self.tokens += int(tokens)
        return None

    def since_logged(self, step: int) -> Interval:
        """Of the steps after the last call, up to optimizer step `step`."""
        now = (step, self.tokens, self.seconds, self._loss)
        steps, tokens, seconds, losses = (new - old for new, old in zip(now, self._logged, strict=True))
        self._logged = now
        # The mean is ours, not Trainer's, which knows nothing of steps before a resume.
        return Interval(losses / steps, tokens / seconds if seconds > 0 else 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds, "loss": self._loss, "logged": list(self._logged)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tokens, self.seconds, self._loss = state["tokens"], state["seconds"], state["loss"]
        self._logged = tuple(state["logged"])
