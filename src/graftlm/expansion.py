"""Raw and effective weights of one block (section 3.2): the model holds W~, and raw weights only inside a step.

With G the gradient of the loss by W~, as any backward pass leaves it:
    dW[N] = G[N]      dW[P] = G[P] + M^T G[N]      dM = G[N] W[P]^T  (through M's factors)
All three are linear in G, so one evaluation per optimizer step on the accumulated gradient is exact.
`reference.py` has the plain formulation (autograd through W~) that this must agree with.

A panel is a matrix's share of some components with the components' dimensions as rows: [k, width], whichever side of
the weight they lie on; k = components * head_dim (or channels).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftlm.advantage import Choice
from graftlm.anatomy import Block, Matrix, linear
from graftlm.operators import OperatorKind, make_operator


def take(weight: Tensor, dim: int, index: Tensor) -> Tensor:
    """Panel [k, slots * other] of `weight` (a matrix, or a bias) at `index` [slots, k] of dimension `dim`."""
    picked = weight.index_select(dim, index.flatten())
    if weight.dim() == 1:
        return picked[:, None]
    slots, k = index.shape
    if dim == 0:
        return picked.view(slots, k, -1).transpose(0, 1).reshape(k, -1)
    return picked.view(-1, slots, k).permute(2, 1, 0).reshape(k, -1)


def unpanel(panel: Tensor, weight: Tensor, dim: int, index: Tensor) -> Tensor:
    """Undo `take`: the panel in the layout that index_copy_ and index_add_ of `weight` want."""
    panel = panel.to(weight.dtype)
    if weight.dim() == 1:
        return panel[:, 0]
    slots, k = index.shape
    if dim == 0:
        return panel.reshape(k, slots, -1).transpose(0, 1).reshape(slots * k, -1)
    # Contiguous: copying columns from a transposed view takes three times as long.
    return panel.reshape(k, slots, -1).permute(2, 1, 0).reshape(-1, slots * k).contiguous()


def put_(weight: Tensor, dim: int, index: Tensor, panel: Tensor) -> None:
    """weight[index] = panel, in place."""
    weight.index_copy_(dim, index.flatten(), unpanel(panel, weight, dim, index))


def add_(weight: Tensor, dim: int, index: Tensor, panel: Tensor, partly: bool) -> None:
    """weight[index] += panel, in place. `partly`: entries of `index` below 0 (not trained) are left out."""
    flat, values = index.flatten(), unpanel(panel, weight, dim, index)
    if partly:
        kept = (flat >= 0).nonzero()[:, 0]
        flat, values = flat[kept], values.index_select(dim, kept)
    weight.index_add_(dim, flat, values)


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
    pieces = []
    for matrix in matrices:
        pieces.append(Piece(f"{matrix.module}.weight", matrix, matrix.dim))
        if matrix.dim == 0 and linear(model, matrix.module).bias is not None:
            pieces.append(Piece(f"{matrix.module}.bias", matrix, 0))
    return pieces


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
        weight = linear(model, matrices[0].module).weight
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

    def reset(self, generator: torch.Generator) -> None:
        """Start of a stage: an operator of exactly zero, diagonals of exactly one."""
        self.operator.reset(generator)
        with torch.no_grad():
            for scale in (self.scale_n, self.scale_p):
                if scale is not None:
                    scale.fill_(1)


Gradients = Callable[[str], tuple[Tensor, Tensor | None] | None]
"""Gradient of the parameter of that name, looked up when used (wrappers replace Parameter objects). With it, where only
slices train, the place of each row or column in that gradient, -1 for those that do not train; None: all of them."""


class Expansion:
    """One block's P, N, ties and raw weights during a stage."""

    def __init__(self, model: nn.Module, block: Block, ties: list[Tie]):
        self.model = model
        self.block = block
        self.ties = ties
        self._choice: Choice | None = None
        self._located: dict[str, tuple[Tensor, Tensor]] = {}
        self.raw: dict[str, Tensor] = {}
        """Raw panels: "<parameter>:n", and ":p" where diagonals change P too; the model holds the effective ones."""

    @property
    def choice(self) -> Choice | None:
        """P and N of the stage; None between stages."""
        return self._choice

    @choice.setter
    def choice(self, choice: Choice | None) -> None:
        self._choice, self._located = choice, {}

    def _indices(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Positions of N and P along the piece's dimension, [slots, k] each; worked out once a stage."""
        if piece.key not in self._located:
            assert self._choice is not None
            device = self.model.get_parameter(piece.name).device
            n, p = self._choice.disadvantageous.to(device), self._choice.advantageous.to(device)
            self._located[piece.key] = piece.matrix.index(n), piece.matrix.index(p)
        return self._located[piece.key]

    def _mixed(self) -> Iterator[tuple[Tie, Piece, Tensor, Tensor, Tensor]]:
        for tie in self.ties:
            for piece in tie.pieces:
                n, p = self._indices(piece)
                yield tie, piece, self.model.get_parameter(piece.name).data, n, p

    @property
    def device(self) -> torch.device:
        return self.model.get_parameter(f"{self.block.mixed[0].module}.weight").device

    def raw_keys(self) -> list[str]:
        """Names of the raw panels of a stage."""
        names = []
        for tie in self.ties:
            for piece in tie.pieces:
                names += [f"{piece.key}:n"] + ([f"{piece.key}:p"] if tie.scale_of(piece)[1] is not None else [])
        return names

    def advantageous_panels(self, tie: Tie) -> list[Tensor]:
        """What the tie's operator acts on."""
        return [self._raw_p(piece, weight, p) for other, piece, weight, _, p in self._mixed() if other is tie]

    @torch.no_grad()
    def begin(self, choice: Choice, generator: torch.Generator) -> None:
        """Start a stage: operators of exactly zero; the model's weights are not touched, so its output stays."""
        self.choice = choice
        for tie in self.ties:
            tie.reset(generator)
        self._remember()

    def _remember(self) -> None:
        self.raw = {}
        for tie, piece, weight, n, p in self._mixed():
            self.raw[piece.key + ":n"] = take(weight, piece.dim, n)
            if tie.scale_of(piece)[1] is not None:
                self.raw[piece.key + ":p"] = take(weight, piece.dim, p)

    @torch.no_grad()
    def restore(self) -> None:
        """Put raw weights into the model, for the optimizer to step on."""
        for _, piece, weight, n, p in self._mixed():
            put_(weight, piece.dim, n, self.raw[piece.key + ":n"])
            on_p = self.raw.get(piece.key + ":p")
            if on_p is not None:
                put_(weight, piece.dim, p, on_p)

    @torch.no_grad()
    def apply(self) -> None:
        """Keep the raw weights that the model holds now and write the effective ones: W~[N] = W[N] + M W[P]."""
        self._remember()
        for tie, piece, weight, n, p in self._mixed():
            raw_n, raw_p = self.raw[piece.key + ":n"], self._raw_p(piece, weight, p)
            added = tie.operator(raw_p.to(tie.dtype))
            scale_n, scale_p = tie.scale_of(piece)
            put_(weight, piece.dim, n, added.add_(raw_n if scale_n is None else scale_n * raw_n))
            if scale_p is not None:
                put_(weight, piece.dim, p, scale_p * raw_p)

    def _raw_p(self, piece: Piece, weight: Tensor, p: Tensor) -> Tensor:
        """The raw panel of P; effective weights of P are the raw ones unless there are diagonals."""
        kept = self.raw.get(piece.key + ":p")
        return take(weight, piece.dim, p) if kept is None else kept

    @torch.no_grad()
    def pull_back(self, gradient: Gradients) -> None:
        """Turn gradients by effective weights into gradients by raw weights, operators and diagonals, in place."""
        for tie, piece, weight, full_n, full_p in self._mixed():
            found = None if tie.by_tokens else gradient(piece.name)
            if found is None:
                continue
            grad, places = found
            n, p = (full_n, full_p) if places is None else (places[full_n], places[full_p])
            g_n = take(grad, piece.dim, n).to(tie.dtype)
            raw_p = self._raw_p(piece, weight, full_p).to(tie.dtype)
            back, factors = tie.operator.pull_back(raw_p, g_n)
            for parameter, factor in zip(tie.operator.parameters(), factors, strict=True):
                accumulate(parameter, factor)
            scale_n, scale_p = tie.scale_of(piece)
            if scale_n is not None:
                raw_n = self.raw[piece.key + ":n"].to(tie.dtype)
                self._accumulate_scale(tie, tie.scale_n, piece, (g_n * raw_n).sum(1))
                put_(grad, piece.dim, n, scale_n * g_n)
            if scale_p is not None:
                g_p = take(grad, piece.dim, p).to(tie.dtype)
                self._accumulate_scale(tie, tie.scale_p, piece, (g_p * raw_p).sum(1))
                put_(grad, piece.dim, p, scale_p * g_p)
            add_(grad, piece.dim, p, back, partly=places is not None)

    @staticmethod
    def _accumulate_scale(tie: Tie, scale: nn.Parameter | None, piece: Piece, grad: Tensor) -> None:
        assert scale is not None
        if scale.grad is None:
            scale.grad = torch.zeros_like(scale)
        scale.grad[tie.matrices.index(piece.matrix)] += grad

    def end(self) -> None:
        """Fusion (eq. 14): the model already holds W~, so forgetting the raw weights is all; not a bit changes."""
        self.raw = {}
        self.choice = None


def accumulate(parameter: nn.Parameter, grad: Tensor) -> None:
    """parameter.grad += grad, as autograd does it."""
    grad = grad.to(parameter.dtype)
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
