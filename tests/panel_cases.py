"""Matrices and places in them, for tests of panels."""

import torch

from graftlm.panels import Place


def case(seed: int, dtype: torch.dtype) -> tuple[list[Place], list[torch.Tensor]]:
    """Rows, columns and runs of columns with slots, of one k and one other dimension."""
    generator = torch.Generator().manual_seed(seed)
    k, other, width = 6 + 2 * (seed % 3), 37 + 30 * seed, 2

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def some(count: int, total: int) -> torch.Tensor:
        return torch.randperm(total, generator=generator)[:count]

    slots = 3
    heads = some(k // width, 9)
    runs = torch.stack([((heads * slots + s)[:, None] * width + torch.arange(width)).flatten() for s in range(slots)])
    places = [Place(some(k, 41)[None], 0), Place(some(k, 50)[None], 1), Place(runs, 1, width)]
    return places, [drawn(41, other), drawn(other, 50), drawn(other, 9 * slots * width)]
