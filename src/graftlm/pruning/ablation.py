"""Importance of components as what the model loses without them, measured."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftlm.anatomy import Block, read_anatomy
from graftlm.fused_loss import fused_where_it_fits
from graftlm.held_out import mean_loss
from graftlm.importance import with_labels
from graftlm.masking import masked
from graftlm.pruning.base import Batch


def ablation(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Importance of every component, by block name: float32 [components], the rise of the mean loss over all tokens of
    `batches`, in nats, when it alone is switched off.

    Exact where Taylor importance is first-order, at a forward pass over `batches` for every component: meant for
    key-value groups, of which there are few. Where a norm is over all heads at once, it stays over all of them.
    """
    anatomy = read_anatomy(model, smallest=1)
    labelled = [with_labels(batch) for batch in batches]
    rises: dict[str, Tensor] = {}
    with fused_where_it_fits(model):
        whole = mean_loss(model, labelled)
        for block in blocks:
            found = torch.zeros(block.components)
            for component in range(block.components):
                with masked(model, anatomy, {block.name: block.units(torch.tensor([component]))}):
                    found[component] = mean_loss(model, labelled) - whole
            rises[block.name] = found
    return rises
