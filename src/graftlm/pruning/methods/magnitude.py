"""Control: the components with the smallest weights go first."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftlm.anatomy import Block
from graftlm.importance import by_component
from graftlm.parts import parts
from graftlm.pruning.base import Batch
from graftlm.pruning.prune import ranked_by


@torch.no_grad()
def magnitude(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The sum of |value| over all that goes with a component, by block name: float32 [components]."""
    scores = {}
    for block in blocks:
        total = torch.zeros(block.components, device=model.device)
        for part in parts(model, block):
            values = part.parameter.float().abs()
            along = values if values.dim() == 1 else values.sum(1 - part.matrix.dim)  # [rows] or [columns]
            total += by_component(along, part.matrix, block.components)
        scores[block.name] = total
    return scores


prune = ranked_by(magnitude)
