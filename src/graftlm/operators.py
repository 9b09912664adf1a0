"""The matrix M that carries the advantageous set into the disadvantageous one's space (section 3.2, eq. 12-13).

Every form gives M x and the adjoint of that product without building M. k = rows of P, d = columns it acts on.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OperatorKind = Literal["monarch", "dense", "diagonal"]


def monarch_shape(k: int) -> tuple[int, int]:
    """Number a and size b of M's blocks: the squarest a * b >= k with a <= b <= 2a, padding as little as may be.

    A k without such factors (a prime, say) is padded: it must not turn into one dense block silently.
    """
    padded = k
    while True:
        for a in range(math.isqrt(padded), 0, -1):
            if padded % a == 0:
                if padded // a <= 2 * a:
                    return a, padded // a
                break  # the next smaller divisor is only further from the square root
        padded += 1


def operator_size(kind: OperatorKind, k: int) -> int:
    """Parameters of an operator on k dimensions: k(a + b) for Monarch (of the padded k), k^2 dense."""
    if kind == "dense":
        return k * k
    a, b = monarch_shape(k)
    return a * b * (a + (b if kind == "monarch" else 1))


class Operator(nn.Module):
    """A k x k matrix M, exactly zero after `reset`."""

    k: int

    def reset(self, generator: torch.Generator) -> None:
        """Start of a stage: M = 0 exactly, ready to learn."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """M x for x [k, d]."""
        raise NotImplementedError

    def adjoint(self, g: Tensor) -> Tensor:
        """M^T g for g [k, d]."""
        raise NotImplementedError

    def pull_back(self, x: Tensor, g: Tensor) -> tuple[Tensor, list[Tensor]]:
        """For g = dL/d(M x), both [k, d]: M^T g [k, d], and dL/d(parameter) in the order of `parameters()`."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """M itself, [k, k], written out from its definition (for tests and the reference; differentiable)."""
        raise NotImplementedError

    def spread(self) -> float:
        """How far M x moves a row per unit step of every zero-started parameter and unit rms of x."""
        raise NotImplementedError


class Dense(Operator):
    """M of eq. 12, k^2 parameters."""

    def __init__(self, k: int, dtype: torch.dtype, device: torch.device | None = None):
        super().__init__()
        self.k = k
        self.M = nn.Parameter(torch.zeros(k, k, dtype=dtype, device=device))

    def reset(self, generator: torch.Generator) -> None:
        nn.init.zeros_(self.M)

    def forward(self, x: Tensor) -> Tensor:
        return self.M @ x

    def adjoint(self, g: Tensor) -> Tensor:
        return self.M.T @ g

    def pull_back(self, x: Tensor, g: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.adjoint(g), [g @ x.T]

    def matrix(self) -> Tensor:
        return self.M

    def spread(self) -> float:
        return math.sqrt(self.k)


class Monarch(Operator):
    """M = [D_ij] blockdiag(R_j): D_ij diagonal b x b, R_j dense b x b, i, j < a; k(a + b) parameters (eq. 13).

    Row (i, t), column (j, u) of M is D[t, i, j] R[j, t, u]. With `diagonal`, R_j is diagonal too: eq. 13 read
    literally. R starts at exactly zero and D Kaiming-uniform (a = sqrt 5, as nn.Linear) with the fan-in of one of
    D's b permuted a x a blocks, which is a: a bound of 1 / sqrt(a).
    """

    def __init__(self, k: int, dtype: torch.dtype, device: torch.device | None = None, diagonal: bool = False):
        super().__init__()
        self.k = k
        self.diagonal = diagonal
        self.a, self.b = monarch_shape(k)
        block = (self.a, self.b) if diagonal else (self.a, self.b, self.b)
        self.R = nn.Parameter(torch.zeros(block, dtype=dtype, device=device))
        self.D = nn.Parameter(torch.zeros(self.b, self.a, self.a, dtype=dtype, device=device))

    def reset(self, generator: torch.Generator) -> None:
        bound = 1 / math.sqrt(self.a)
        # Drawn on the CPU in float32, so that a seed means the same operator on every device and in every dtype.
        drawn = torch.empty(self.D.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.R.zero_()
            self.D.copy_(drawn)

    def _split(self, x: Tensor) -> Tensor:
        """[k, d] -> [a, b, d], padded with zeros."""
        if self.a * self.b > self.k:
            x = F.pad(x, (0, 0, 0, self.a * self.b - self.k))
        return x.unflatten(0, (self.a, self.b))

    def _join(self, x: Tensor) -> Tensor:
        """[a, b, d] -> [k, d]."""
        return x.reshape(self.a * self.b, -1)[: self.k]

    def _inner(self, x: Tensor) -> Tensor:
        """blockdiag(R) x: [a, b, d] -> [a, b, d]."""
        return self.R[..., None] * x if self.diagonal else torch.bmm(self.R, x)

    def forward(self, x: Tensor) -> Tensor:
        y = self._inner(self._split(x)).transpose(0, 1)  # [b, a, d]
        return self._join(torch.bmm(self.D, y).transpose(0, 1))

    def _inner_adjoint(self, y: Tensor) -> Tensor:
        """blockdiag(R)^T y: [a, b, d] -> [a, b, d]."""
        return self.R[..., None] * y if self.diagonal else torch.bmm(self.R.transpose(1, 2), y)

    def adjoint(self, g: Tensor) -> Tensor:
        y = torch.bmm(self.D.transpose(1, 2), self._split(g).transpose(0, 1)).transpose(0, 1)  # [a, b, d]
        return self._join(self._inner_adjoint(y))

    def pull_back(self, x: Tensor, g: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, g = self._split(x), self._split(g).transpose(0, 1)  # [a, b, d], [b, a, d]
        y = self._inner(x).transpose(0, 1)  # [b, a, d]
        grad_d = torch.bmm(g, y.transpose(1, 2))  # [b, a, a]
        grad_y = torch.bmm(self.D.transpose(1, 2), g).transpose(0, 1)  # [a, b, d]
        # [a, b] when R is diagonal, else [a, b, b]
        grad_r = (grad_y * x).sum(-1) if self.diagonal else torch.bmm(grad_y, x.transpose(1, 2))
        return self._join(self._inner_adjoint(grad_y)), [grad_r, grad_d]

    def matrix(self) -> Tensor:
        inner = torch.diag_embed(self.R) if self.diagonal else self.R
        full = torch.einsum("tij,jtu->itju", self.D, inner)  # row (i, t), column (j, u)
        return full.reshape(self.a * self.b, -1)[: self.k, : self.k]

    def spread(self) -> float:
        summands = self.a if self.diagonal else self.a * self.b
        return math.sqrt(summands) * float(self.D.detach().double().square().mean().sqrt())


def make_operator(kind: OperatorKind, k: int, dtype: torch.dtype, device: torch.device | None = None) -> Operator:
    """An operator on k dimensions, zero until `reset` draws what is drawn."""
    if kind == "dense":
        return Dense(k, dtype, device)
    return Monarch(k, dtype, device, diagonal=kind == "diagonal")
