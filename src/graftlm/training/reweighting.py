"""Loss-based weights of samples: in every micro-batch, samples count by how their loss compares with the others'.

Source: Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", ICLR 2025,
arXiv 2502.06733, and facts of its published code. The losses of a micro-batch are spread over [-1, 1] by its lowest and
highest, a strategy makes a score of each, and softmax(score / r) gives weights whose sum is one: over all samples of
the micro-batch, those of all processes. Until the warmup ends, samples count alike.

A sample is a sequence, or a document in it where documents are kept apart (as in an assessment); its loss is the mean
over its supervised tokens. As in the code, n samples count by n times their weight and by their tokens, as in the plain
loss, which it is where they count alike: until the warmup ends. The gradient does not go through the weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from graftlm.methods.sparse_settings import ReweightingSettings
from graftlm.samples import IGNORED, Samples, find_samples
from graftlm.training.distributed import world_size


def sample_losses(logits: Tensor, labels: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Mean loss of every sample and how many supervised tokens it has: [n] each; 0 where there are none.

    Args:
        logits: [B, S, V]; position s predicts token s + 1.
        labels: int64 [B, S]; -100 is not supervised.
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    # A prediction belongs to the sample of its target; the first token of a row is nobody's.
    by_token = torch.stack([losses, (targets != IGNORED).to(losses)], -1)  # [B, S - 1, 2]
    sums, counts = samples.sum(F.pad(by_token, (0, 0, 1, 0))).unbind(-1)
    return sums / counts.clamp(min=1), counts


def scores(losses: Tensor, low: Tensor, high: Tensor, strategy: str) -> Tensor:
    """Score of each loss, in [0, 1], where the lowest and the highest are as given; "uniform": 1."""
    if strategy == "uniform":
        return torch.ones_like(losses)
    h = (2 * losses - low - high) / (high - low).clamp(min=1e-6)  # in [-1, 1]
    if strategy == "linupper":
        return (h + 1).clamp(max=1)
    return 1 - h.square() if strategy == "quadratic" else h.abs()


@torch.no_grad()
def weights_of(losses: Tensor, counts: Tensor, strategy: str, r: float) -> Tensor:
    """Weights of this process's samples [n]; all processes' together sum to one."""
    there = counts > 0
    bounds = torch.stack([  # the lowest, negated, and the highest
        -losses.where(there, torch.inf).min(), losses.where(there, -torch.inf).max()
    ])  # fmt: skip
    if world_size() > 1:
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
    found = scores(losses, -bounds[0], bounds[1], strategy)
    # The highest score, of all processes: 1 of `linupper` alone. Without it one of the exponentials is 1, so that none
    # overflows, nor do all become zero, however small r is.
    best = found.where(there, -torch.inf).max()
    if world_size() > 1:
        dist.all_reduce(best, dist.ReduceOp.MAX)
    shares = torch.exp((found - best) / r).where(there, 0)
    total = shares.sum()
    if world_size() > 1:
        dist.all_reduce(total)
    return shares / total.clamp(min=torch.finfo(total.dtype).tiny)


class Reweighting:
    """The loss of a run's micro-batches, for Trainer (compute_loss_func): `watch` before, then a call."""

    def __init__(self, settings: ReweightingSettings, progress: Callable[[], tuple[int, int]]):
        """`progress`: optimizer steps taken so far, and those of the run."""
        self._settings = settings
        self._progress = progress
        self._inputs: Mapping[str, Any] = {}

    def watch(self, inputs: Mapping[str, Any]) -> None:
        """The micro-batch whose loss is asked for next."""
        self._inputs = inputs

    def strategy(self) -> str:
        """In the step that goes on."""
        step, total = self._progress()
        return "uniform" if step < round(self._settings.warmup_ratio * total) else self._settings.strategy

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """This process's part of the loss: a scalar; over all processes and micro-batches of the step the parts sum to
        its loss.

        Args:
            outputs: the model's, with logits [B, S, V].
            labels: int64 [B, S].
            num_items_in_batch: supervised tokens of the whole step, of all processes; None: the micro-batch is all.
        """
        inputs = self._inputs
        shape = (labels.shape[0], labels.shape[1])
        samples = find_samples(shape, inputs.get("attention_mask"), inputs.get("position_ids"), labels.device)
        losses, counts = sample_losses(outputs["logits"], labels, samples)
        weights = weights_of(losses.detach(), counts, self.strategy(), self._settings.r)
        whole = torch.stack([counts.sum(), (counts > 0).sum().to(counts)])  # of the micro-batch: tokens, samples
        if world_size() > 1:
            dist.all_reduce(whole)
        items = whole[0] if num_items_in_batch is None else num_items_in_batch
        return (weights * whole[1] * counts * losses).sum() / items
