"""How much the model loses when one layer alone loses a share of its components (Adapt-Pruner, fig. 1, above)."""

from collections.abc import Mapping, Sequence
from math import exp
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftlm.anatomy import Anatomy, Block, read_anatomy
from graftlm.held_out import mean_loss
from graftlm.masking import masked
from graftlm.pruning.base import Batch
from graftlm.pruning.taylor import taylor

UNIFORM = (0.1, 0.2)
"""Shares that go from all layers at once, to compare with."""


def layer_sensitivity(
    model: PreTrainedModel, calibration: Sequence[Batch], held_out: Sequence[Mapping[str, Tensor]], share: float
) -> dict[str, Any]:
    """Loss (nats per token) and perplexity on `held_out` without the least important `share` of the key-value groups
    and channels of one layer at a time, of none, and of UNIFORM in all layers.

    Importance is first-order Taylor on `calibration`. Components are masked, which computes what a model without them
    would (but where a norm is over all heads at once), so the model is left as it is.
    """
    anatomy = read_anatomy(model, smallest=1)
    scores = taylor(model, anatomy.blocks, calibration)

    def without(share: float, blocks: Sequence[Block]) -> dict[str, float | None]:
        units = {block.name: least_important(block, scores[block.name], share) for block in blocks}
        return loss_without(model, anatomy, units, held_out)

    layers = [
        {"layer": i, **without(share, [block for block in anatomy.blocks if block.layer == i])}
        for i in range(anatomy.layers)
    ]
    uniform = [{"share": one, **without(one, anatomy.blocks)} for one in UNIFORM]
    return {"share": share, "none": without(0.0, ()), "uniform": uniform, "layers": layers}


def least_important(block: Block, scores: Tensor, share: float) -> Tensor:
    """Ranked units (query heads, channels) of the components of `block` that go when it keeps int(n (1 - share)) of
    them, at least one: int64 [units]. `scores`: [components]."""
    keep = max(1, int(block.components * (1 - share) + 1e-9))
    going = scores.cpu().argsort(stable=True)[: block.components - keep]
    return block.units(going)


@torch.no_grad()
def loss_without(
    model: PreTrainedModel, anatomy: Anatomy, units: Mapping[str, Tensor], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, float | None]:
    """Mean loss on `batches`, and its perplexity (None: too large for a number), with those units switched off."""
    with masked(model, anatomy, units):
        loss = mean_loss(model, batches)
    return {"loss": loss, "perplexity": exp(loss) if loss < 700 else None}
