"""The gated product of gate.py as Triton kernels: each value is read once and written once.

Shapes: T tokens, n samples, F channels, C chunks of BLOCK_TOKENS tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graftlm.samples import Samples

BLOCK_TOKENS, BLOCK_CHANNELS = 64, 128
NAMES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3}


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """f(x) and f'(x), float32."""
    if ACTIVATION == 0:
        s = tl.sigmoid(x)
        y, slope = x * s, s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == 1:
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y, slope = x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = 2.0 * tl.sigmoid(2.0 * inner) - 1.0  # tanh, without one
        y = 0.5 * x * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    else:
        r = tl.maximum(x, 0.0)
        y, slope = r * r, 2.0 * r
    return y, slope


@triton.jit
def _forward(
    gate, up, product, ids, counts, parts, tokens, channels, length,
    ACTIVATION: tl.constexpr, SUMS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of the product. SUMS 1: samples are `length` tokens each; 2: as ids and counts say."""
    chunk = tl.program_id(0)
    row = chunk * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < tokens)[:, None] & (column < channels)[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    g = tl.load(gate + at, mask=inside, other=0.0)
    u = tl.load(up + at, mask=inside, other=0.0)
    active, _ = _activate(g.to(tl.float32), ACTIVATION)
    # Rounded as PyTorch's two operations round: the activation's output first, then the product.
    active = active.to(g.dtype).to(tl.float32)
    tl.store(product + at, (active * u.to(tl.float32)).to(g.dtype), mask=inside)
    if SUMS > 0:
        last_row = tl.minimum(chunk * TOKENS + TOKENS, tokens) - 1
        if SUMS == 1:
            sample = row // length
            first, last = chunk * TOKENS // length, last_row // length
            counted = row < tokens
        else:
            sample = tl.load(ids + row, mask=row < tokens, other=0)
            first, last = tl.load(ids + chunk * TOKENS), tl.load(ids + last_row)
            counted = tl.load(counts + row, mask=row < tokens, other=0) != 0
        squares = tl.where(counted[:, None], active * active, 0.0)
        # A part for each sample that this chunk touches. Samples and chunks both rise along the tokens, so their sum
        # is a place of its own; and parts added up afterwards, unlike atomics, come out the same every time.
        for n in range(first, last + 1):
            of_sample = tl.sum(tl.where((sample == n)[:, None], squares, 0.0), axis=0)
            place = (chunk + n).to(tl.int64) * channels + column
            tl.store(parts + place, of_sample, mask=column < channels)


@triton.jit
def _backward(
    grad, gate, up, to_gate, to_up, tokens, channels,
    ACTIVATION: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < tokens)[:, None] & (column < channels)[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    d = tl.load(grad + at, mask=inside, other=0.0)
    g = tl.load(gate + at, mask=inside, other=0.0)
    u = tl.load(up + at, mask=inside, other=0.0)
    active, slope = _activate(g.to(tl.float32), ACTIVATION)
    active = active.to(g.dtype).to(tl.float32)
    wide = d.to(tl.float32)
    of_active = (wide * u.to(tl.float32)).to(g.dtype).to(tl.float32)
    tl.store(to_up + at, (wide * active).to(g.dtype), mask=inside)
    tl.store(to_gate + at, (of_active * slope).to(g.dtype), mask=inside)


def _grid(tokens: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(tokens, BLOCK_TOKENS), triton.cdiv(channels, BLOCK_CHANNELS)


def forward(gate: Tensor, up: Tensor, activation: str, samples: Samples | None) -> tuple[Tensor, Tensor | None]:
    """As gate.plain_forward, for contiguous [B, S, F] of float32, bfloat16 or float16 on a GPU."""
    channels = gate.shape[-1]
    tokens = gate.numel() // channels
    product = torch.empty_like(gate)
    grid = _grid(tokens, channels)
    kind, length, ids, counts = 0, 1, gate, gate  # what is not used is not read
    parts = gate
    if samples is not None:
        parts = gate.new_zeros(grid[0] + samples.count - 1, channels, dtype=torch.float32)  # [C + n - 1, F]
        kind, length = 1, tokens // samples.count
        if samples.ids is not None and samples.counts is not None:
            kind, ids, counts = 2, samples.ids, samples.counts.view(torch.uint8)
    constants: Any = {"ACTIVATION": NAMES[activation], "SUMS": kind}
    _forward[grid](
        gate, up, product, ids, counts, parts, tokens, channels, length,
        **constants, TOKENS=BLOCK_TOKENS, CHANNELS=BLOCK_CHANNELS,
    )  # fmt: skip
    return product, None if samples is None else _add_up(parts, samples, tokens)


def _add_up(parts: Tensor, samples: Samples, tokens: int) -> Tensor:
    """Parts [C + n - 1, F], sample after sample, -> [n, F]."""
    n = torch.arange(samples.count, device=parts.device)
    begins = n * (tokens // samples.count) if samples.ids is None else torch.searchsorted(samples.ids, n)
    chunks = torch.full((samples.count + 1,), len(parts) - samples.count, device=parts.device)
    chunks[:-1] = begins // BLOCK_TOKENS  # the chunk that each sample begins in; and the last one of all
    # Lengths are known to fit (unsafe), so nothing is looked up on the host.
    return torch.segment_reduce(parts, "sum", lengths=chunks.diff() + 1, axis=0, unsafe=True, initial=0)


def backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """As gate.plain_backward."""
    channels = gate.shape[-1]
    tokens = gate.numel() // channels
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _backward[_grid(tokens, channels)](
        grad, gate, up, of_gate, of_up, tokens, channels,
        ACTIVATION=NAMES[activation], TOKENS=BLOCK_TOKENS, CHANNELS=BLOCK_CHANNELS,
    )  # fmt: skip
    return of_gate, of_up
