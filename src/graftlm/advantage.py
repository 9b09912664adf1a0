"""Scores of components and the choice of P and N (section 3.1, eq. 3-6)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graftlm.anatomy import Block
from graftlm.errors import UserError

TOP_K_AT_ONCE = 2**24
"""Values that are ranked at a time: their keys take eight bytes each."""


def count_of(share: float, n: int) -> int:
    """How many of n components a share K is: rounded half up, at least one."""
    return max(1, math.floor(share * n + 0.5))


def sets_fit(block: Block, share: float) -> bool:
    """Whether two disjoint sets of a share K of the components of `block` fit."""
    return 2 * count_of(share, block.components) <= block.components


def set_size(block: Block, share: float) -> int:
    """Size of P, and of N, in components of `block`. Raises UserError if two disjoint sets of it do not fit."""
    size = count_of(share, block.components)
    if not sets_fit(block, share):
        unit = "key-value groups" if block.kind == "heads" else "channels"
        raise UserError(
            f"apex.k_{block.kind}: {share} of {block.components} {unit} in layer {block.layer} is {size}, "
            f"and P and N of {size} each would overlap; choose at most {(block.components // 2) / block.components:.4g}"
        )
    return size


def rank_votes(activations: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
    """Per sample +1 for the k highest, -1 for the k lowest, summed over samples (eq. 3, 5).

    Ties break by index (the smaller index counts as the higher), so a run is repeatable. Nothing is fetched from the
    device.

    Args:
        activations: [samples, n], or of several modules at once [modules, samples, n]; never negative.
        valid: bool [samples], those that have a vote; None: all.

    Returns:
        int64 [n] or [modules, n].
    """
    if activations.dim() == 2:
        return rank_votes(activations[None], k, valid)[0]
    modules, _, n = activations.shape
    votes = torch.zeros(modules, n, dtype=torch.int64, device=activations.device)
    weight = torch.ones((), dtype=torch.int64, device=votes.device) if valid is None else valid.long()[:, None]
    at_once = max(1, TOP_K_AT_ONCE // max(1, activations[0].numel()))
    for part, counted in zip(activations.split(at_once), votes.split(at_once), strict=True):
        for chosen, vote in zip(_extremes(part, k), (weight, -weight), strict=True):  # each [modules, samples, k]
            counted.scatter_add_(1, chosen.flatten(1), vote.expand_as(chosen).flatten(1))
    return votes


def _extremes(activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the k highest and of the k lowest along the last dimension, in no order."""
    n = activations.shape[-1]
    if activations.dtype != torch.float32:
        order = activations.argsort(dim=-1, descending=True, stable=True)
        return order[..., :k], order[..., n - k :]
    # Bits of floats that are not negative rise as the floats do; below them the index, so that no two are equal and a
    # top-k, a fraction of a sort's work, is as good.
    index = torch.arange(n - 1, -1, -1, device=activations.device)
    keys = activations.contiguous().view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(index)
    return keys.topk(k, sorted=False).indices, keys.topk(k, largest=False, sorted=False).indices


@dataclass(frozen=True)
class Choice:
    """One block's sets for one stage. `order` lists all components from the highest score to the lowest."""

    advantageous: Tensor
    """P: int64 [k], ascending."""
    disadvantageous: Tensor
    """N: int64 [k], ascending."""
    order: Tensor
    """int64 [components]."""


def choose(block: Block, ranked_scores: Tensor, size: int) -> Choice:
    """P and N of `block` from the scores [ranked] of its heads or channels (eq. 4, 6).

    Query heads of one key-value group share V, so a group's score is the sum of theirs. Ties break by index.
    """
    scores = ranked_scores.view(block.components, block.slots).sum(1)  # [components]
    order = scores.argsort(descending=True, stable=True)
    return Choice(order[:size].sort().values, order[block.components - size :].sort().values, order)
