"""How full the spaces of P and N are, and how much of them they share (section 3.4; the paper assumes, we measure).

The vectors of a component are its rows where rows are mixed (v, up, gate) and its columns where columns are (o, down),
each of the weight's other dimension d. P's panel is then a set of k vectors, N's another.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.advantage import Choice
from graftlm.anatomy import Anatomy, linear
from graftlm.panels import Place, local

SMALL = 0.01
"""A singular value counts for the numerical rank from this share of the largest one of [W_P, W_N] on."""


@dataclass(frozen=True)
class Subspaces:
    """Of one matrix. Ranks are numbers of dimensions; `vectors` each of P and N, in `dimensions`."""

    vectors: int
    dimensions: int
    effective_rank_p: float
    """exp of the entropy of the singular values' shares (Roy and Vetterli, 2007), which needs no threshold."""
    effective_rank_n: float
    effective_rank_both: float
    """Of [W_P, W_N]."""
    numerical_rank_p: int
    """Singular values of at least 1% of the largest one of [W_P, W_N] (footnote 4; the paper gives no epsilon)."""
    numerical_rank_n: int
    numerical_rank_both: int
    overlap: float
    """Mean squared cosine of the principal angles between the spans of P and N: 0 orthogonal, 1 the same."""
    overlap_by_chance: float
    """The same for spans of those dimensions drawn at random."""


def effective_rank(values: Tensor) -> float:
    """exp(entropy) of singular values [n] as shares of their sum; 0 where all are 0."""
    total = values.sum()
    if total == 0:
        return 0.0
    share = values / total
    return float(torch.special.entr(share).sum().exp())


def overlap(p: Tensor, n: Tensor) -> tuple[float, float]:
    """(overlap, what chance would give) of the row spans of p [k, d] and n [m, d]; (0, 0) where one is all 0."""
    bases = []
    for panel in (p, n):
        _, values, vectors = torch.linalg.svd(panel, full_matrices=False)
        bases.append(vectors[values > values.max() * max(panel.shape) * torch.finfo(panel.dtype).eps])
    small = min(len(basis) for basis in bases)
    if small == 0:
        return 0.0, 0.0
    shared = float((bases[0] @ bases[1].T).square().sum()) / small
    # A random vector of the smaller span has this share of its square in the larger one.
    return shared, max(len(basis) for basis in bases) / p.shape[1]


def measure(p: Tensor, n: Tensor) -> Subspaces:
    """P's and N's vectors [k, d], of any dtype, measured in float64; on the CPU, since GPUs are slow at it."""
    p, n = p.cpu().double(), n.cpu().double()
    both = torch.linalg.svdvals(torch.cat([p, n]))
    of_p, of_n = torch.linalg.svdvals(p), torch.linalg.svdvals(n)
    least = SMALL * both.max()
    shared, chance = overlap(p, n)
    counts = [int((values >= least).sum()) if least > 0 else 0 for values in (of_p, of_n, both)]
    return Subspaces(
        vectors=len(p),
        dimensions=p.shape[1],
        effective_rank_p=effective_rank(of_p),
        effective_rank_n=effective_rank(of_n),
        effective_rank_both=effective_rank(both),
        numerical_rank_p=counts[0],
        numerical_rank_n=counts[1],
        numerical_rank_both=counts[2],
        overlap=shared,
        overlap_by_chance=chance,
    )


@torch.no_grad()
def read_subspaces(model: nn.Module, anatomy: Anatomy, choices: Mapping[str, Choice]) -> dict[str, dict[str, Any]]:
    """Block name -> role of a mixed matrix -> its Subspaces as a dict. `choices`: by block name."""
    found: dict[str, dict[str, Any]] = {}
    for block in anatomy.blocks:
        choice = choices[block.name]
        for matrix in block.mixed:
            weight = local(linear(model, matrix.module).weight)
            panels = [
                Place(matrix.index(chosen).to(weight.device), matrix.dim, matrix.width).take(weight).flatten(0, 1)
                for chosen in (choice.advantageous, choice.disadvantageous)
            ]
            found.setdefault(block.name, {})[matrix.role] = asdict(measure(*panels))
    return found
