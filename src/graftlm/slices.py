"""Training only some rows or columns of a linear layer: only their gradients exist, only what they need is saved.

The layer's weight is frozen and holds effective values; what trains is a `Slice`, a copy of the rows or columns of raw
values. Where N does not train whole there is no G[N], so operators get their gradient from tokens instead:
rows mixed, dM = sum of dy_N (x) y_P; columns mixed, dM = sum of x_N (x) dx_P. T tokens, k = dimensions of P.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.operators import Operator


class Slice(nn.Module):
    """Trainable rows (dim 0) or columns (dim 1) of one linear layer; with its bias entries where rows train."""

    def __init__(self, layer: nn.Linear, dim: int, count: int):
        super().__init__()
        self.dim = dim
        other = layer.weight.shape[1 - dim]
        shape = (count, other) if dim == 0 else (other, count)
        self.weight = nn.Parameter(torch.empty(shape, dtype=layer.weight.dtype, device=layer.weight.device))
        has_bias = dim == 0 and layer.bias is not None
        self.bias = nn.Parameter(self.weight.new_empty(count)) if has_bias else None
        self.index = torch.empty(0, dtype=torch.int64)
        """Which rows or columns, ascending: int64 [count]."""
        self.places = torch.empty(0, dtype=torch.int64)
        """Place of every row or column in the slice, -1 for those that do not train: int64 [rows or columns]."""

    @torch.no_grad()
    def choose(self, layer: nn.Linear, index: Tensor) -> None:
        """Take the rows or columns `index` from the layer, as they are now."""
        self.index = index.to(layer.weight.device)
        self.places = torch.full((layer.weight.shape[self.dim],), -1, device=layer.weight.device)
        self.places[self.index] = torch.arange(len(index), device=layer.weight.device)
        self.weight.copy_(layer.weight.index_select(self.dim, self.index))
        if self.bias is not None:
            self.bias.copy_(layer.bias.index_select(0, self.index))

    @torch.no_grad()
    def write(self, layer: nn.Linear) -> None:
        """Write the trained values into the layer."""
        layer.weight.index_copy_(self.dim, self.index, self.weight)
        if self.bias is not None:
            layer.bias.index_copy_(0, self.index, self.bias)


@dataclass
class Route:
    """Where one operator's gradient is read off in a linear layer: N and P along the mixed dimension, [slots, k]."""

    operator: Operator
    n: Tensor
    p: Tensor

    def by_rows(self, tokens: Tensor, index: Tensor) -> Tensor:
        """Columns `index` of tokens [T, features] as an operator wants them: [k, slots * T]."""
        picked = tokens[:, index.flatten()].view(len(tokens), *index.shape)  # [T, slots, k]
        return picked.permute(2, 1, 0).reshape(index.shape[1], -1).to(next(self.operator.parameters()).dtype)

    def to_tokens(self, panel: Tensor, like: Tensor) -> Tensor:
        """Undo `by_rows`: [k, slots * T] -> [T, slots * k]."""
        slots, k = self.n.shape
        return panel.view(k, slots, -1).permute(2, 1, 0).reshape(-1, slots * k).to(like.dtype)


class Plan:
    """What a sliced linear layer needs in its backward pass besides tensors."""

    def __init__(self, found: Slice | None, dim: int):
        self.slice = found
        self.dim = dim
        self.routes: list[Route] = []
        self.pulled: list[tuple[Tensor, Tensor]] = []
        """For each route of mixed columns: those of P that train, by place in the slice and in P; int64 [n] each."""

    def lay(self, routes: list[Route]) -> None:
        """Start of a stage. What depends on indices alone is worked out here: looking at them stalls a GPU."""
        self.routes, self.pulled = routes, []
        for route in routes:
            places = self.slice.places[route.p.flatten()] if self.slice is not None and self.dim == 1 else route.p[:0]
            kept = (places.flatten() >= 0).nonzero()[:, 0]
            self.pulled.append((places.flatten()[kept], kept))


class _SlicedLinear(torch.autograd.Function):
    """y = x W~^T + b, whose backward pass computes gradients for the slice and the operators alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, *trained: Tensor) -> Tensor:
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        ctx.plan = plan
        ctx.shapes = [t.shape for t in trained]
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        saved: list[Tensor] = []
        if plan.dim == 0:
            # Mixed rows: the whole input where any row trains, and y_P for each operator.
            saved += [x] if plan.slice is not None else []
            saved += [flat_y[:, r.p.flatten()] for r in plan.routes]
        else:
            # Mixed columns: only the inputs of the columns that train, and x_N for each operator.
            saved += [_pulled_inputs(flat_x, plan)] if plan.slice is not None else []
            saved += [flat_x[:, r.n.flatten()] for r in plan.routes]
        ctx.save_for_backward(weight, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        plan: Plan = ctx.plan
        weight, *saved = ctx.saved_tensors
        dy = grad_outputs[0]
        need_dx = ctx.needs_input_grad[0] or (plan.dim == 1 and plan.routes)
        dx = dy @ weight.to(dy.dtype) if need_dx else None
        flat_dy = dy.reshape(-1, dy.shape[-1])  # [T, out]
        inputs = saved.pop(0) if plan.slice is not None else None
        factors: list[Tensor] = []
        for route, kept in zip(plan.routes, saved, strict=True):
            whole = torch.arange(route.n.numel(), device=kept.device).view(route.n.shape)
            if plan.dim == 0:
                y_p, dy_n = route.by_rows(kept, whole), route.by_rows(flat_dy, route.n)
                back, grads = route.operator.pull_back(y_p, dy_n)
                if plan.slice is not None:  # dy_P + M^T dy_N: what the raw rows of P see
                    flat_dy = flat_dy.index_add(1, route.p.flatten(), route.to_tokens(back, flat_dy))
            else:
                assert dx is not None
                dx_p = route.by_rows(dx.reshape(-1, dx.shape[-1]), route.p)
                _, grads = route.operator.pull_back(dx_p, route.by_rows(kept, whole))
            factors += grads
        trained: list[Tensor | None] = []
        if plan.slice is not None and inputs is not None:
            if plan.dim == 0:
                picked = flat_dy[:, plan.slice.index]  # [T, rows]
                trained.append(picked.T @ inputs.reshape(-1, inputs.shape[-1]))
                trained += [picked.sum(0)] if plan.slice.bias is not None else []
            else:
                trained.append(flat_dy.T @ inputs)
        everything = [None if g is None else g.view(s) for g, s in zip([*trained, *factors], ctx.shapes, strict=True)]
        return (dx if ctx.needs_input_grad[0] else None, None, None, None, *everything)


def _pulled_inputs(x: Tensor, plan: Plan) -> Tensor:
    """Inputs [T, count] that the raw columns of the slice see: x, plus M^T x_N where a column of P trains."""
    assert plan.slice is not None
    inputs = x[:, plan.slice.index]
    for route, (places, kept) in zip(plan.routes, plan.pulled, strict=True):
        if len(kept):
            back = route.to_tokens(route.operator.adjoint(route.by_rows(x, route.n)), x)
            inputs = inputs.index_add(1, places, back[:, kept])
    return inputs


def install(layer: nn.Linear, plan: Plan) -> Callable[[], None]:
    """Make `layer` run by `plan`; returns what undoes it. The layer's own weight and bias are frozen by the caller."""

    def forward(x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        trained: list[Tensor] = []
        if plan.slice is not None:
            trained += [p for p in (plan.slice.weight, plan.slice.bias) if p is not None]
        for route in plan.routes:
            trained += list(route.operator.parameters())
        return _SlicedLinear.apply(x, layer.weight, layer.bias, plan, *trained)  # type: ignore[no-any-return]

    layer.forward = forward  # type: ignore[assignment]
    return lambda: layer.__dict__.pop("forward", None)
