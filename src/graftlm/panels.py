"""Reading and writing the rows or columns of a weight that belong to some components.

A panel is a matrix's share of those components, [slots, k, other], whichever side of the weight they lie on:
k = components * head_dim (or channels), other = the weight's other dimension (1 for a bias).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from graftlm.triton_kernels import triton_works


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a sharded tensor (sharing its memory); the tensor itself otherwise."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Place:
    """Where some components lie along one dimension of a weight (or bias, or gradient), for as long as a stage lasts.

    Columns are read and written in the weight's own order, row by row: a panel of them is a view whose memory is
    [other, slots, k]. Column by column, every value would be a cache line of its own.
    """

    def __init__(self, index: Tensor, dim: int, width: int = 1):
        """Args:
        index: int64 [slots, k], positions along `dim`; those below 0 are absent (`add_` and `renew_` leave them out).
        dim: 0, rows; 1, columns.
        width: columns come in aligned runs of so many neighbours (head_dim), which are read faster.
        """
        self.index = index
        self.dim = dim
        self.slots, self.k = index.shape
        self.width = width
        self.flat = index.flatten()
        self._runs = self.flat[::width] // width

    @cached_property
    def _present(self) -> tuple[Tensor, Tensor]:
        """Positions that are there, and which of the panel's they are. Worked out once: it stalls a GPU."""
        kept = (self.flat >= 0).nonzero()[:, 0]
        return self.flat[kept], kept

    def _in_runs(self, weight: Tensor) -> bool:
        return self.width > 1 and weight.shape[1] % self.width == 0

    def take(self, weight: Tensor) -> Tensor:
        """Copy the panel [slots, k, other] out of `weight`."""
        if self.dim == 0:
            return weight.index_select(0, self.flat).view(self.slots, self.k, -1)
        return self.columns(weight).view(-1, self.slots, self.k).permute(1, 2, 0)

    def columns(self, weight: Tensor) -> Tensor:
        """Copy the columns out of `weight` [other, columns] as they lie there: [other, slots * k]."""
        if self._in_runs(weight):
            return weight.unflatten(1, (-1, self.width)).index_select(1, self._runs).flatten(1)
        return weight.gather(1, self.flat.expand(len(weight), -1))

    def renew_(self, panel: Tensor, weight: Tensor) -> None:
        """panel = weight[index], in place; what is absent stays as it is."""
        flat, kept = self._present
        if len(kept) == len(self.flat):
            panel.copy_(self.take(weight))
            return
        values = weight.index_select(self.dim, flat)
        values = values.T if self.dim == 1 else values.view(len(flat), -1)  # [present, other]
        panel[kept // self.k, kept % self.k] = values.to(panel.dtype)

    def put_(self, weight: Tensor, panel: Tensor) -> None:
        """weight[index] = panel, in place."""
        panel = panel.to(weight.dtype)
        if self.dim == 0:
            weight.index_copy_(0, self.flat, panel.reshape(len(self.flat), *weight.shape[1:]))
            return
        panel = panel.permute(2, 0, 1)  # [other, slots, k]
        if self._in_runs(weight):
            runs = panel.reshape(len(panel), -1, self.width)
            weight.unflatten(1, (-1, self.width)).index_copy_(1, self._runs, runs)
        else:
            weight.scatter_(1, self.flat.expand(len(panel), -1), panel.flatten(1))

    def add_(self, weight: Tensor, panel: Tensor, partly: bool = False) -> None:
        """weight[index] += panel, in place. `partly`: positions below 0 (not trained) are left out."""
        panel = panel.to(weight.dtype)
        flat, kept = self._present if partly else (self.flat, None)
        if self.dim == 0:
            values = panel.reshape(len(self.flat), *weight.shape[1:])
        else:
            values = panel.permute(2, 0, 1).flatten(1)  # [other, slots * k]
        weight.index_add_(self.dim, flat, values if kept is None else values.index_select(self.dim, kept))


def _kernels(tensors: Sequence[Tensor]) -> Any:
    """The GPU kernels that serve many matrices in one launch, where there is something for them to do."""
    if len(tensors) == 1 or not tensors[0].is_cuda or not triton_works():
        return None
    from graftlm import panel_kernels

    return panel_kernels


def take_all(places: Sequence[Place], weights: Sequence[Tensor]) -> Tensor:
    """The panels of matrices that share k and other, as one batch: [n, k, other], n = slots of all together."""
    if kernels := _kernels(weights):
        return kernels.take(places, weights)  # type: ignore[no-any-return]
    panels = [place.take(weight) for place, weight in zip(places, weights, strict=True)]
    return panels[0] if len(panels) == 1 else torch.cat(panels)


def put_all(places: Sequence[Place], weights: Sequence[Tensor], panels: Sequence[Tensor]) -> None:
    """weight[index] = panel for each of several matrices that share k and other, in place."""
    if kernels := _kernels(weights):
        kernels.put_(places, weights, panels)
        return
    for place, weight, panel in zip(places, weights, panels, strict=True):
        place.put_(weight, panel)


def add_all(places: Sequence[Place], weights: Sequence[Tensor], panels: Sequence[Tensor], partly: bool = False) -> None:
    """weight[index] += panel for each of several matrices that share k and other, in place (`partly`: Place.add_)."""
    if not partly and (kernels := _kernels(weights)):
        kernels.add_(places, weights, panels)
        return
    for place, weight, panel in zip(places, weights, panels, strict=True):
        place.add_(weight, panel, partly)
