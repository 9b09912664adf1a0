"""Switching heads or channels off, to see what the model loses (the masking experiment of table 4)."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.anatomy import Anatomy, Block, Matrix
from graftlm.errors import UserError


@contextlib.contextmanager
def masked(model: nn.Module, anatomy: Anatomy, units: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, those units add nothing to the residual stream: their inputs of the output projection are zero.

    Weights are not touched, and what the hooks do ends with the context. The same as zeroing the units' columns in the
    output projection (o, down).

    Args:
        units: by block name (Anatomy.blocks), ids of what is ranked: int64 [n], query heads or channels.

    Raises UserError for a block or a unit that does not exist.
    """
    blocks = {block.name: block for block in anatomy.blocks}
    handles: list[Any] = []
    try:
        for name, ids in units.items():
            if name not in blocks:
                raise UserError(f"mask: {name} is no block of this model; there are {', '.join(blocks)}")
            handles.append(_mask(model, blocks[name], ids))
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_columns(block: Block, ids: Tensor) -> tuple[Matrix, Tensor]:
    """The output projection of `block` and the columns of its weight that units `ids` [n] feed: int64 [n * width]."""
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < block.ranked:
        raise UserError(f"mask: {block.name} has {block.kind} 0 to {block.ranked - 1}, not {ids.tolist()}")
    output = block.output
    return output, (output.offset + ids[:, None] * output.width + torch.arange(output.width)).flatten()


def _mask(model: nn.Module, block: Block, ids: Tensor) -> Any:
    output, columns = output_columns(block, ids)

    def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].index_fill(-1, columns.to(args[0].device), 0), *args[1:]

    return model.get_submodule(output.module).register_forward_pre_hook(before)
