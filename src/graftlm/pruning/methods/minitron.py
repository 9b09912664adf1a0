"""Pruning by activations, Minitron's way (Muralidharan et al. 2024, arXiv 2407.14679; Sreenivas et al. 2024, arXiv
2408.11796).

The importance of a head is the L2 norm of its output, that of a neuron its activation (section 2.2), aggregated as
their best practice 2 says, (batch=L2, seq=mean): the mean of absolute values over the tokens of a sequence, then the L2
norm over sequences. Single shot (best practice 3: iterating brings nothing), every layer the same shape.

We differ: the unit is a key-value group, whose heads' importances are summed; a gated FFN's neuron is what enters the
down projection (as in NVIDIA's Model Optimizer); the shape is not searched for (section 2.3) but the same share of
heads and of channels goes. Left out: embedding channels, layers, and the residual of removed query heads added to those
that stay, which has nothing to work on where whole groups go. The distillation that Minitron owes its results to is
shrink's `distillation`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftlm.anatomy import Block
from graftlm.pruning.base import Batch
from graftlm.pruning.inputs import watch_inputs
from graftlm.pruning.prune import ranked_by


def activation(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """L2 norm over sequences of the mean over tokens of a head's norm or a channel's magnitude, by block name: float32
    [components]."""
    squares: dict[str, Tensor] = {}

    def see(block: Block, inputs: Tensor, mask: Tensor) -> None:
        units = inputs.unflatten(-1, (block.ranked, block.width))  # [B, S, heads or channels, width]
        sizes = torch.linalg.vector_norm(units, dim=-1) * mask[..., None]  # a channel's width is 1
        means = sizes.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)  # [B, ranked]
        squares[block.name] = squares.get(block.name, torch.zeros(())) + means.square().sum(0)

    watch_inputs(model, blocks, batches, see)
    return {
        block.name: squares[block.name].sqrt().view(block.components, block.slots).sum(1).float().cpu()
        for block in blocks
    }


prune = ranked_by(activation)
