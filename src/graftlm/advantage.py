"""Scores of components and the choice of P and N (section 3.1, eq. 3-6)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graftlm.anatomy import Block
from graftlm.errors import UserError


def count_of(share: float, n: int) -> int:
    """How many of n components a share K is: rounded half up, at least one."""
    return max(1, math.floor(share * n + 0.5))


def set_size(block: Block, share: float) -> int:
    """Size of P, and of N, in components of `block`. Raises UserError if two disjoint sets of it do not fit."""
    size = count_of(share, block.components)
    if 2 * size > block.components:
        unit = "key-value groups" if block.kind == "heads" else "channels"
        raise UserError(
            f"apex.k_{block.kind}: {share} of {block.components} {unit} in layer {block.layer} is {size}, "
            f"and P and N of {size} each would overlap; choose at most {(block.components // 2) / block.components:.4g}"
        )
    return size


def rank_votes(activations: Tensor, k: int) -> Tensor:
    """Per sample +1 for the k highest, -1 for the k lowest, summed over samples: [samples, n] -> int64 [n] (eq. 3, 5).

    Ties break by index (the smaller index counts as the higher), so a run is repeatable.
    """
    order = activations.argsort(dim=1, descending=True, stable=True)  # [samples, n]
    votes = torch.zeros(activations.shape[1], dtype=torch.int64, device=activations.device)
    one = torch.ones((), dtype=torch.int64, device=activations.device)
    votes.index_put_((order[:, :k].flatten(),), one, accumulate=True)
    votes.index_put_((order[:, activations.shape[1] - k :].flatten(),), -one, accumulate=True)
    return votes


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
