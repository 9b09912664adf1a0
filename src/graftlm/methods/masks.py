"""Which entries of a tensor a step may change: the highest by a score; all others are kept exactly where they are."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftlm.advantage import count_of
from graftlm.methods.base import Method
from graftlm.methods.sparse_settings import MaskSettings
from graftlm.training.config import RunConfig

Scores = Callable[[], Tensor]
"""Scores of one tensor's entries, never negative: computed when asked for, so that not all of them are there at once.
Asked twice, they are the same."""


def top_entries(scores: Tensor, count: int) -> Tensor:
    """The `count` highest of `scores`, as a mask of their shape; ties go to the smaller index."""
    flat = scores.flatten()
    if count >= len(flat):
        return torch.ones_like(scores, dtype=torch.bool)
    # On a GPU torch selects from one tensor with a single block of threads.
    least = kth_highest([lambda: flat], count) if flat.is_cuda else flat.kthvalue(len(flat) - count + 1).values
    return _above(flat, least, count)[0].view(scores.shape)


def top_of_all(scores: Sequence[Scores], count: int) -> list[Tensor]:
    """The `count` highest of all scores together, as one mask a tensor; ties go to the earlier tensor and the smaller
    index. Scores are compared as float32."""
    least = kth_highest(scores, count)
    # All that is above the threshold has its place; the rest goes to entries that are equal to it.
    missing = count - sum(int((s().float() > least).sum()) for s in scores)
    masks = []
    for score in scores:
        found = score().float()
        above = found > least
        mask, ties = _above(found.flatten(), least, int(above.sum()) + missing)
        masks.append(mask.view(found.shape))
        missing -= ties
    return masks


def _above(flat: Tensor, least: Tensor, count: int) -> tuple[Tensor, int]:
    """A mask of what is above `least`, and of the first that are equal to it up to `count` in all; and how many of
    these there are."""
    mask = flat > least
    ties = (flat == least).nonzero()[:, 0][: count - int(mask.sum())]
    mask[ties] = True
    return mask, len(ties)


def kth_highest(scores: Sequence[Scores], count: int) -> Tensor:
    """The `count`-th highest of all scores, exactly, without putting them side by side: bits of floats that are not
    negative rise as the floats do, so counting their upper halves, and then the lower halves of one of these, finds
    it. A float32 scalar."""
    upper, left = _bin_of((_bits(score) >> 16 for score in scores), count)
    lower, _ = _bin_of((bits[bits >> 16 == upper] & 0xFFFF for bits in map(_bits, scores)), left)
    device = scores[0]().device
    return torch.tensor((upper << 16) + lower, dtype=torch.int32, device=device).view(torch.float32)


def _bits(score: Scores) -> Tensor:
    return score().float().flatten().view(torch.int32)


def _bin_of(numbers: Iterable[Tensor], count: int) -> tuple[int, int]:
    """The number, below 2^16, that the `count`-th highest of all is; and its rank among its equals, from 1."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for some in numbers:
        counts += torch.bincount(some, minlength=1 << 16).cpu()
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, count))
    before = int(from_above[place - 1]) if place else 0
    return len(counts) - 1 - place, count - before


class GradientMask(Method):
    """In every step, only some entries of the gradient are used; which, a subclass says by their scores.

    The gradient is that of the whole step, averaged over its micro-batches, before clipping, which then sees what is
    left of it. Entries that are masked are held where they are through the optimizer's step; its moments see a gradient
    of zero. Needs, during a step, a byte an entry and a copy of the entries held.
    """

    def __init__(self, model: PreTrainedModel, config: RunConfig):
        super().__init__(model, config)
        self.settings: MaskSettings = config.gradient_mask
        self._masks: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}

    @abstractmethod
    def scores(self, number: int, gradient: Tensor) -> Tensor:
        """Scores of the entries of the model's parameter `number` in the step that goes on, never negative."""

    def start(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        if self.settings.hold:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def after_backward(self) -> None:
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self._masks = self.choose(gradients)
        for name, gradient in gradients.items():
            gradient.mul_(self._masks[name])  # NaN stays NaN, and stops the run

    def choose(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The entries of each gradient that are used, as masks of its shape."""
        share = self.settings.share
        if self.settings.scope == "matrix":
            return {
                name: top_entries(self.scores(number, g), count_of(share, g.numel()))
                for number, (name, g) in enumerate(gradients.items())
            }
        scores = [lambda number=number, g=g: self.scores(number, g) for number, g in enumerate(gradients.values())]
        masks = top_of_all(scores, count_of(share, sum(g.numel() for g in gradients.values())))
        return dict(zip(gradients, masks, strict=True))

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        self._held = {name: self.model.get_parameter(name)[~mask] for name, mask in self._masks.items()}

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for name, values in self._held.items():
            self.model.get_parameter(name).masked_scatter_(~self._masks[name], values)
        self._masks, self._held = {}, {}

    def working_bytes(self) -> int:
        """Masks of a byte an entry, and the entries held."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        held = sum(round((1 - self.settings.share) * p.nbytes) for p in trained) if self.settings.hold else 0
        return sum(p.numel() for p in trained) + held

    @property
    def trainable(self) -> int:
        return sum(count_of(self.settings.share, p.numel()) for p in self.model.parameters() if p.requires_grad)
