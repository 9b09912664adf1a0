"""Panels of many matrices read or written in one launch (panels.py, for GPUs).

Matrices are found through tables of addresses, so that a step needs as many launches for a model of 100 layers as for
one of ten. An entry is one slot of one matrix; n entries.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_K, BLOCK_OTHER = 32, 64
TAKE, PUT, ADD = 0, 1, 2
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


@triton.jit
def _move(
    weights, panels, index, along, across, panel_k, panel_other, k, other,
    MODE: tl.constexpr, WEIGHT: tl.constexpr, PANEL: tl.constexpr, K: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """One tile of one entry. Strides in elements: `along` the mixed dimension of the weight, `across` it."""
    entry = tl.program_id(0)
    rows = tl.program_id(1) * K + tl.arange(0, K)
    columns = tl.program_id(2) * OTHER + tl.arange(0, OTHER)
    inside = (rows < k)[:, None] & (columns < other)[None, :]
    at = tl.load(index + entry * k + rows, mask=rows < k, other=0)  # int64
    weight = tl.load(weights + entry).to(tl.pointer_type(WEIGHT))
    panel = tl.load(panels + entry).to(tl.pointer_type(PANEL))
    far = columns.to(tl.int64)[None, :]
    in_weight = weight + at[:, None] * tl.load(along + entry) + far * tl.load(across + entry)
    in_panel = panel + rows.to(tl.int64)[:, None] * tl.load(panel_k + entry) + far * tl.load(panel_other + entry)
    if MODE == 0:
        tl.store(in_panel, tl.load(in_weight, mask=inside).to(PANEL), mask=inside)
    else:
        value = tl.load(in_panel, mask=inside).to(WEIGHT)
        if MODE == 2:  # rounded to the weight's type before adding, as index_add_ wants it
            old = tl.load(in_weight, mask=inside)
            wide_enough = tl.float64 if tl.float64 == WEIGHT else tl.float32
            value = (old.to(wide_enough) + value.to(wide_enough)).to(WEIGHT)
        tl.store(in_weight, value, mask=inside)


def _run(mode: int, places: Sequence[Any], weights: Sequence[Tensor], panels: Sequence[Tensor]) -> None:
    first = places[0]
    table: list[list[int]] = [[], [], [], [], [], []]
    for place, weight, panel in zip(places, weights, panels, strict=True):
        if weight.dtype != weights[0].dtype or panel.dtype != panels[0].dtype:
            raise TypeError("weights of one batch share a dtype, and so do its panels")
        across = weight.stride(1 - place.dim) if weight.dim() == 2 else 0
        for slot in range(place.slots):
            entry = panel[slot]
            columns = (weight.data_ptr(), entry.data_ptr(), weight.stride(place.dim), across, *entry.stride())
            for column, value in zip(table, columns, strict=True):
                column.append(value)
    n, other = len(table[0]), panels[0].shape[2]
    device = weights[0].device
    # From pinned memory, so that the copy waits for nothing that the GPU has yet to do.
    host = torch.tensor(table, dtype=torch.int64)
    found = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
    index = torch.cat([place.index for place in places])  # [n, k]
    grid = (n, triton.cdiv(first.k, BLOCK_K), triton.cdiv(other, BLOCK_OTHER))
    _move[grid](
        found[0], found[1], index, found[2], found[3], found[4], found[5], first.k, other,
        MODE=mode, WEIGHT=TYPES[weights[0].dtype], PANEL=TYPES[panels[0].dtype], K=BLOCK_K, OTHER=BLOCK_OTHER,
    )  # fmt: skip


def take(places: Sequence[Any], weights: Sequence[Tensor]) -> Tensor:
    """As panels.take_all: [n, k, other]."""
    weight, place = weights[0], places[0]
    n, other = sum(p.slots for p in places), weight.shape[1 - place.dim] if weight.dim() == 2 else 1
    batch = torch.empty(n, place.k, other, dtype=weight.dtype, device=weight.device)
    _run(TAKE, places, weights, batch.split([p.slots for p in places]))
    return batch


def put_(places: Sequence[Any], weights: Sequence[Tensor], panels: Sequence[Tensor]) -> None:
    """As panels.put_all."""
    _run(PUT, places, weights, panels)


def add_(places: Sequence[Any], weights: Sequence[Tensor], panels: Sequence[Tensor]) -> None:
    """As panels.add_all, where every position is there."""
    _run(ADD, places, weights, panels)
