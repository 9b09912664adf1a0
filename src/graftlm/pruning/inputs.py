"""What reaches the output projections while a model looks at calibration sequences: the raw material of every measure
that needs no gradients."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.activations import MODEL_INPUTS, no_logits
from graftlm.anatomy import Block, linear
from graftlm.modes import evaluating
from graftlm.pruning.base import Batch

Seen = Callable[[Block, Tensor, Tensor], None]
"""A block, the inputs of its output projection float32 or float64 [B, S, columns], and which positions are tokens
(bool [B, S]; the others are padding)."""


def column_norms(model: nn.Module, block: Block) -> Tensor:
    """Squared L2 norm of every column of the block's output projection: float32 or float64 [columns]."""
    weight = linear(model, block.output.module).weight.detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum(0)


@torch.no_grad()
def watch_inputs(model: nn.Module, blocks: Sequence[Block], batches: Iterable[Batch], seen: Seen) -> None:
    """Run the model over `batches` in evaluation mode, and hand over what reaches each block's output projection."""
    device = next(model.parameters()).device
    tokens: list[Tensor] = []

    def before(block: Block, _module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs: Tensor = args[0].detach()
        seen(block, inputs.to(torch.promote_types(inputs.dtype, torch.float32)), tokens[-1])

    handles = [
        model.get_submodule(block.output.module).register_forward_pre_hook(partial(before, block)) for block in blocks
    ]
    try:
        with evaluating(model):
            for batch in batches:
                inputs = {key: value.to(device) for key, value in batch.items() if key in MODEL_INPUTS}
                mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
                tokens.append(mask.bool())
                model(**inputs, use_cache=False, **no_logits(model))
    finally:
        for handle in handles:
            handle.remove()
