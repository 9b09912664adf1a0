"""Pruning by activation times weight, as WINA chooses neurons (Chen et al. 2025, arXiv 2505.19427, section 3).

WINA keeps, at every token, the inputs x_j of a linear layer with the largest |x_j| * ||W_:,j||_2. It switches them off
while the model runs and removes nothing; here the same score, averaged over tokens, says which components go for good.
We differ: one score a component (the sum over the columns of the output projection that it feeds) in place of one a
column, and only the output projections are looked at.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftlm.anatomy import Block
from graftlm.importance import by_component
from graftlm.pruning.base import Batch
from graftlm.pruning.inputs import column_norms, watch_inputs
from graftlm.pruning.prune import ranked_by


def wina(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Mean over tokens of |input| times the norm of its column, summed over a component: float32 [components]."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}

    def see(block: Block, inputs: Tensor, mask: Tensor) -> None:
        sums[block.name] = sums.get(block.name, torch.zeros(())) + inputs[mask].abs().sum(0)
        tokens[block.name] = tokens.get(block.name, torch.zeros(())) + mask.sum()

    watch_inputs(model, blocks, batches, see)
    scores = {}
    for block in blocks:
        columns = sums[block.name] / tokens[block.name] * column_norms(model, block).sqrt()
        scores[block.name] = by_component(columns, block.output, block.components).float().cpu()
    return scores


prune = ranked_by(wina)
