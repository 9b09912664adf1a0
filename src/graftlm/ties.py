"""One operator and the matrices of a block that share it (section 3.2): which tensors it mixes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftlm.anatomy import Block, Matrix, linear
from graftlm.operators import OperatorKind, make_operator
from graftlm.parts import parts_in


@dataclass(frozen=True)
class Piece:
    """One tensor that a tie mixes: a weight, or the bias of mixed rows."""

    name: str
    matrix: Matrix
    dim: int

    @property
    def key(self) -> str:
        """Unique even where one module holds several matrices (fused projections)."""
        return f"{self.name}:{self.matrix.role}"


def pieces_of(model: nn.Module, matrices: tuple[Matrix, ...]) -> list[Piece]:
    """Weights, and biases where rows are mixed and there are any, in a fixed order."""
    return [Piece(part.path, matrix, matrix.dim) for matrix in matrices for part in parts_in(model, matrix)]


class Tie(nn.Module):
    """One operator and the matrices of a block that share it."""

    def __init__(
        self,
        model: nn.Module,
        block: Block,
        matrices: tuple[Matrix, ...],
        size: int,
        kind: OperatorKind,
        diagonals: bool,
    ):
        super().__init__()
        self.block = block
        self.matrices = matrices
        self.name = f"{block.name}_{'_'.join(m.role for m in matrices)}"
        self.by_tokens = False
        """N does not train whole, so there is no G[N]: the operator's gradient comes token by token (slices.py)."""
        self.pieces = pieces_of(model, matrices)
        weight, *_ = [linear(model, m.module).weight for m in matrices]  # every one is checked
        self.dtype = dtype = torch.promote_types(weight.dtype, torch.float32)
        self.k = size * block.width
        self.operator = make_operator(kind, self.k, dtype, weight.device)
        # The authors' diagonals: on N in every mixed matrix, on P where rows are mixed (v, up, gate).
        mixes_rows = [m for m in matrices if m.dim == 0]
        ones = torch.ones(len(matrices) if diagonals else 0, self.k, dtype=dtype, device=weight.device)
        self.scale_n = nn.Parameter(ones) if diagonals else None
        self.scale_p = nn.Parameter(torch.ones_like(ones[: len(mixes_rows)])) if diagonals and mixes_rows else None

    def scale_of(self, piece: Piece) -> tuple[Tensor | None, Tensor | None]:
        """Diagonals [k, 1] on N and P of `piece`; None where there is none."""
        if self.scale_n is None:
            return None, None
        row = self.matrices.index(piece.matrix)
        on_p = self.scale_p[row][:, None] if self.scale_p is not None and piece.dim == 0 else None
        return self.scale_n[row][:, None], on_p

    def leave_p(self) -> None:
        """Do without the diagonal on P, whose gradient is read off in that of all of P."""
        self.scale_p = None

    def reset(self, generator: torch.Generator, scale: float = 1.0) -> None:
        """Start of a stage: an operator of exactly zero, its D scaled by `scale`; diagonals of exactly one."""
        self.operator.reset(generator, scale)
        with torch.no_grad():
            for diagonal in (self.scale_n, self.scale_p):
                if diagonal is not None:
                    diagonal.fill_(1)
