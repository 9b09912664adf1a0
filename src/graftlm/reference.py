"""The plain formulation of expansion: autograd through W~ (eq. 7-13). Slow and obvious; what expansion.py must equal.

Every mixed parameter is parametrised: the optimizer sees raw weights, the model computes with
    rows:     W~[N, :] = W[N, :] + M W[P, :]        columns:  W~[:, N] = W[:, N] + W[:, P] M^T
written out per matrix, with M as a full matrix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from graftlm.advantage import Choice
from graftlm.anatomy import Block, Matrix
from graftlm.ties import Piece, Tie


def _span(matrix: Matrix, components: Tensor) -> Tensor:
    """Indices of `components` in a matrix with one slot, component by component: int64 [n * width]."""
    return torch.cat([matrix.offset + int(c) * matrix.width + torch.arange(matrix.width) for c in components])


def effective(raw: Tensor, tie: Tie, piece: Piece, choice: Choice) -> Tensor:
    """W~ of one matrix (or bias) from raw values, differentiable; computed in float32 at least, rounded once."""
    matrix, dtype = piece.matrix, raw.dtype
    raw = raw.to(torch.promote_types(dtype, torch.float32))
    n, p = choice.disadvantageous.cpu(), choice.advantageous.cpu()
    mixer = tie.operator.matrix().to(raw.dtype)
    scale_n, scale_p = (None if s is None else s[:, 0].to(raw.dtype) for s in tie.scale_of(piece))
    if piece.dim == 1:
        # o_proj's columns viewed as [out, group, slot, dim], M as [n, e, p, d] (apex.md's formula for grouped queries)
        view = raw.unflatten(1, (-1, matrix.slots, matrix.width))
        full = mixer.view(len(n), matrix.width, len(p), matrix.width)
        added = torch.einsum("oprd,nepd->onre", view[:, p], full)
        old = view[:, n]
        if scale_n is not None:
            old = old * scale_n.view(len(n), 1, matrix.width)
        rows = [view[:, g] for g in range(view.shape[1])]
        for i, group in enumerate(n.tolist()):
            rows[group] = old[:, i] + added[:, i]
        return torch.stack(rows, 1).flatten(1).to(dtype)
    span_n, span_p = _span(matrix, n), _span(matrix, p)
    old_n, old_p = raw[span_n], raw[span_p]
    added = mixer @ old_p
    shape = (-1,) + (1,) * (raw.dim() - 1)
    out = raw.clone()
    out[span_n] = (old_n if scale_n is None else scale_n.view(shape) * old_n) + added
    if scale_p is not None:
        out[span_p] = scale_p.view(shape) * old_p
    return out.to(dtype)


class _Effective(nn.Module):
    """Parametrisation of one parameter by every matrix that lives in it (several in fused projections)."""

    def __init__(self, parts: Sequence[tuple[Tie, Piece, Choice]]):
        super().__init__()
        self._parts = list(parts)  # not submodules: their parameters belong to the reference, once

    def forward(self, raw: Tensor) -> Tensor:
        for tie, piece, choice in self._parts:
            raw = effective(raw, tie, piece, choice)
        return raw


class ReferenceExpansion:
    """Expansion of `model` by autograd. Parameters to optimise: `raw_parameters()` and the ties' own."""

    def __init__(self, model: nn.Module, stages: Sequence[tuple[Block, Sequence[Tie], Choice]]):
        self.model = model
        self.ties = [tie for _, ties, _ in stages for tie in ties]
        parts: dict[str, list[tuple[Tie, Piece, Choice]]] = {}
        for _, ties, choice in stages:
            for tie in ties:
                for piece in tie.pieces:
                    parts.setdefault(piece.name, []).append((tie, piece, choice))
        self.names = list(parts)
        for name, found in parts.items():
            module, _, kind = name.rpartition(".")
            parametrize.register_parametrization(model.get_submodule(module), kind, _Effective(found), unsafe=True)

    def raw_parameters(self) -> dict[str, nn.Parameter]:
        """Raw parameters under the names they have in a model without parametrisations."""
        return {
            name.replace("parametrizations.", "").removesuffix(".original"): parameter
            for name, parameter in self.model.named_parameters()
        }

    def fuse(self) -> None:
        """Write W~ into the model and drop the parametrisations."""
        for name in self.names:
            module, _, kind = name.rpartition(".")
            parametrize.remove_parametrizations(self.model.get_submodule(module), kind, leave_parametrized=True)
