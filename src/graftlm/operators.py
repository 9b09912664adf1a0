"""The matrix M that carries the advantageous set into the disadvantageous one's space (section 3.2, eq. 12-13).

Every form gives M x and the adjoint of that product without building M. k = rows of P, d = columns it acts on.
"""

import math
from collections.abc import Sequence
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


class Operator(nn.Module):
    """A k x k matrix M, exactly zero after `reset`.

    `product` and `pull_products` serve n operators of one shape at once; x and g are [n, k, d] and may be views of any
    strides, `parameters` are those of all n stacked, in the order of `parameters()`.
    """

    k: int

    def reset(self, generator: torch.Generator, scale: float = 1.0) -> None:
        """Start of a stage: M = 0 exactly, ready to learn. `scale`: factor on what is drawn (D)."""
        raise NotImplementedError

    def product(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        """M x: [n, k, d]."""
        raise NotImplementedError

    def pull_products(self, parameters: Sequence[Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, list[Tensor]]:
        """For g = dL/d(M x): M^T g [n, k, d], and dL/d(parameter), stacked like `parameters`."""
        raise NotImplementedError

    def pull_matrix(self, grad: Tensor) -> list[Tensor]:
        """dL/d(parameter), in the order of `parameters()`, from dL/dM [k, k]."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """M itself, [k, k], written out from its definition (for tests and the reference; differentiable)."""
        raise NotImplementedError

    def spread(self) -> float:
        """How far M x moves a row per unit step of every zero-started parameter and unit rms of x."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """M x for x [k, d]."""
        return self.product(stacked([self]), x[None])[0]


def stacked(operators: Sequence[Operator]) -> list[Tensor]:
    """Parameters of operators of one shape, [n, ...] each; those of a single operator are not copied."""
    if len(operators) == 1:
        return [p[None] for p in operators[0].parameters()]
    return [torch.stack(same) for same in zip(*(o.parameters() for o in operators), strict=True)]


class Dense(Operator):
    """M of eq. 12, k^2 parameters."""

    def __init__(self, k: int, dtype: torch.dtype, device: torch.device | None = None):
        super().__init__()
        self.k = k
        self.M = nn.Parameter(torch.zeros(k, k, dtype=dtype, device=device))

    def reset(self, generator: torch.Generator, scale: float = 1.0) -> None:
        nn.init.zeros_(self.M)

    def product(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        return torch.bmm(parameters[0], x)

    def pull_products(self, parameters: Sequence[Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, list[Tensor]]:
        return torch.bmm(parameters[0].transpose(1, 2), g), [torch.bmm(g, x.transpose(1, 2))]

    def pull_matrix(self, grad: Tensor) -> list[Tensor]:
        return [grad]

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

    def reset(self, generator: torch.Generator, scale: float = 1.0) -> None:
        bound = scale / math.sqrt(self.a)
        # Drawn on the CPU in float32, so that a seed means the same operator on every device and in every dtype.
        drawn = torch.empty(self.D.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.R.zero_()
            self.D.copy_(drawn)

    def _split(self, x: Tensor) -> Tensor:
        """[n, k, d] -> [n * a, b, d], padded with zeros."""
        if self.a * self.b > self.k:
            x = F.pad(x, (0, 0, 0, self.a * self.b - self.k))
        return x.unflatten(1, (self.a, self.b)).flatten(0, 1)

    def _turn(self, y: Tensor) -> Tensor:
        """[n * a, b, d] -> [n * b, a, d]; a view when n is 1."""
        return y.unflatten(0, (-1, self.a)).transpose(1, 2).flatten(0, 1)

    def _turn_back(self, y: Tensor) -> Tensor:
        """[n * b, a, d] -> [n * a, b, d]; a view when n is 1."""
        return y.unflatten(0, (-1, self.b)).transpose(1, 2).flatten(0, 1)

    def _join(self, x: Tensor) -> Tensor:
        """[n * a, b, d] -> [n, k, d]."""
        return x.reshape(-1, self.a * self.b, x.shape[-1])[:, : self.k]

    def _inner(self, inner: Tensor, x: Tensor, adjoint: bool = False) -> Tensor:
        """blockdiag(R) x, or blockdiag(R)^T x: [n * a, b, d] -> [n * a, b, d]; inner [n * a, b(, b)]."""
        if self.diagonal:
            return inner[..., None] * x
        return torch.bmm(inner.transpose(1, 2) if adjoint else inner, x)

    def product(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        inner, outer = (p.flatten(0, 1) for p in parameters)
        y = self._turn(self._inner(inner, self._split(x)))  # [n * b, a, d]
        return self._join(self._turn_back(torch.bmm(outer, y)))

    def pull_products(self, parameters: Sequence[Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, list[Tensor]]:
        n = len(x)
        inner, outer = (p.flatten(0, 1) for p in parameters)
        # g is read twice, and a panel of columns in an order that bmm would copy each time.
        x, g = self._split(x), self._turn(self._split(g.contiguous()))  # [n * a, b, d], [n * b, a, d]
        y = self._turn(self._inner(inner, x))  # [n * b, a, d]
        grad_d = torch.bmm(g, y.transpose(1, 2))  # [n * b, a, a]
        grad_y = self._turn_back(torch.bmm(outer.transpose(1, 2), g))  # [n * a, b, d]
        # [n * a, b] when R is diagonal, else [n * a, b, b]
        grad_r = (grad_y * x).sum(-1) if self.diagonal else torch.bmm(grad_y, x.transpose(1, 2))
        back = self._join(self._inner(inner, grad_y, adjoint=True))
        return back, [grad_r.unflatten(0, (n, self.a)), grad_d.unflatten(0, (n, self.b))]

    def pull_matrix(self, grad: Tensor) -> list[Tensor]:
        padding = self.a * self.b - self.k
        blocks = F.pad(grad, (0, padding, 0, padding)).view(self.a, self.b, self.a, self.b)  # [i, t, j, u]
        inner = torch.diag_embed(self.R) if self.diagonal else self.R
        grad_r = torch.einsum("itju,tij->jtu", blocks, self.D)
        grad_d = torch.einsum("itju,jtu->tij", blocks, inner)
        return [grad_r.diagonal(dim1=1, dim2=2) if self.diagonal else grad_r, grad_d]

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
