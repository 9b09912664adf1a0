"""Training only some rows or columns of a linear layer: only their gradients exist, only what they need is saved.

The layer's weight is frozen and holds effective values; what trains is a `Slice`, a copy of the rows or columns of raw
values. Where N does not train whole there is no G[N], so operators get their gradient from tokens instead:
rows mixed, dM = sum of dy_N (x) y_P; columns mixed, dM = sum of x_N (x) dx_P. T tokens, k = dimensions of P.
dM is summed as a full matrix and goes through M's factors once: one plain product of k^2 a token is faster, on CPUs and
GPUs alike, than several of its factors' shapes, and still small beside the layer's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.modes import replace_forward
from graftlm.operators import Operator
from graftlm.panels import Place, local
from graftlm.scattering import GradientScatter
from graftlm.sharding import empty_beside


class Slice(nn.Module):
    """Trainable rows (dim 0) or columns (dim 1) of one linear layer; with its bias entries where rows train.

    Held in float32 at least: small updates would be lost in bfloat16. Where the layer's weight is sharded, so is the
    slice; its bias entries are whole on every process.
    """

    def __init__(self, layer: nn.Linear, dim: int, count: int):
        super().__init__()
        self.dim = dim
        other = layer.weight.shape[1 - dim]
        shape = (count, other) if dim == 0 else (other, count)
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        self.weight = nn.Parameter(empty_beside(layer.weight, shape, 1 - dim, dtype))
        has_bias = dim == 0 and layer.bias is not None
        self.bias = nn.Parameter(torch.empty(count, dtype=dtype, device=layer.weight.device)) if has_bias else None
        self._stand_in: Tensor | None = None
        self.index = torch.empty(0, dtype=torch.int64)
        """Which rows or columns, ascending: int64 [count]."""
        self.places = torch.empty(0, dtype=torch.int64)
        """Place of every row or column in the slice, -1 for those that do not train: int64 [rows or columns]."""

    def scattered_by(self, scatter: GradientScatter, layer: int) -> None:
        """Let gradients of the weight, which is sharded, go through `scatter`, with those of the layer `layer`."""
        self._stand_in = scatter.stand_in(layer, self, "weight")

    @torch.no_grad()
    def choose(self, layer: nn.Linear, index: Tensor, width: int = 1) -> None:
        """Take the rows or columns `index` [count], in runs of `width` (panels.py), from the layer as they are now."""
        self.index = index.to(layer.weight.device)
        self.places = torch.full((layer.weight.shape[self.dim],), -1, device=layer.weight.device)
        self.places[self.index] = torch.arange(len(index), device=layer.weight.device)
        self._place = Place(self.index[None], self.dim, width)
        self._panel().copy_(self._place.take(local(layer.weight)))
        if self.bias is not None:
            self.bias.copy_(layer.bias.index_select(0, self.index))

    def leaves(self) -> list[Tensor]:
        """What autograd gives the gradients of weight and bias to, [count, other] or [other, count] and [count]."""
        weight = self.weight if self._stand_in is None else self._stand_in
        return [weight] if self.bias is None else [weight, self.bias]

    def _panel(self) -> Tensor:
        """The values as panels.py has them, as far as this process holds them: [1, count, other]; a view."""
        values = local(self.weight)
        return (values if self.dim == 0 else values.T)[None]

    @torch.no_grad()
    def write(self, layer: nn.Linear) -> None:
        """Write the trained values into the layer, rounded to its dtype."""
        self._place.put_(local(layer.weight), self._panel())
        if self.bias is not None:
            layer.bias.index_copy_(0, self.index, self.bias.to(layer.bias.dtype))


@dataclass
class Route:
    """Where one operator's gradient is read off in a linear layer: N and P along the mixed dimension, [slots, k] each.

    Every slot of every token is a vector of k that M acts on.
    """

    operator: Operator
    n: Tensor
    p: Tensor
    trained: Tensor | None = None
    """Those of P that train, by place in P: int64 [m], the same in every slot. None: none does."""
    places: Tensor | None = None
    """Their places in the slice: int64 [slots * m]."""

    def lay(self, found: Slice | None) -> None:
        """Start of a stage. What depends on indices alone is worked out here: looking at them stalls a GPU."""
        self.trained = self.places = None
        if found is not None:
            places = found.places[self.p]  # [slots, k]
            trained = (places[0] >= 0).nonzero()[:, 0]
            if len(trained):
                self.trained, self.places = trained, places[:, trained].flatten()

    def factors(self, g: Tensor, x: Tensor) -> list[Tensor]:
        """Gradients of the operator's parameters from g = dL/d(M x) and x, tokens [T, slots * k] each."""
        k = self.n.shape[1]
        summed = g.reshape(-1, k).T @ x.reshape(-1, k)  # [k, k]
        return self.operator.pull_matrix(summed.to(next(self.operator.parameters()).dtype))

    def add_back_(self, tokens: Tensor, g: Tensor) -> None:
        """tokens [T, count] += M^T g, in place, where columns of P train; g is [T, slots * k]."""
        if self.trained is not None and self.places is not None:
            mixer = self.operator.matrix()[:, self.trained].to(g.dtype)  # [k, m]
            tokens.index_add_(1, self.places, (g.reshape(-1, len(mixer)) @ mixer).view(len(tokens), -1))


class Plan:
    """What a sliced linear layer needs in its backward pass besides tensors."""

    def __init__(self, found: Slice | None, dim: int, width: int = 1):
        """`width`: what trains and what is mixed comes in aligned runs of so many rows or columns (panels.py)."""
        self.slice = found
        self.dim = dim
        self.width = width
        self.routes: list[Route] = []
        self.lay([])

    def lay(self, routes: list[Route]) -> None:
        """Start of a stage; the slice has been chosen."""
        self.routes = routes
        for route in routes:
            route.lay(self.slice)
        self.p = [self._columns(route.p) for route in routes]
        self._of_slice: Place | None = None
        if self.slice is None and not routes:
            return
        # Passing over all tokens costs, not how many columns are taken: N of each route, and then what else the slice
        # has, are picked at once.
        picked = [route.n.flatten() for route in routes]
        self._widths = [len(n) for n in picked]
        if self.slice is not None:
            index = self.slice.index
            picked.append(index[~torch.isin(index, torch.cat(picked))] if picked else index)
        index = torch.cat(picked)
        self._picked = self._columns(index)
        if self.slice is not None and routes:
            order = index.argsort()
            self._of_slice = self._columns(order[torch.searchsorted(index[order], self.slice.index)])

    def _columns(self, index: Tensor) -> Place:
        """Where columns of tokens [T, features] lie."""
        return Place(index.view(1, -1), 1, self.width)

    def pick(self, tokens: Tensor) -> Tensor:
        """Columns of tokens [T, features] that are N of a route or the slice's: contiguous, [T, picked]."""
        return self._picked.columns(tokens)

    def of_routes(self, picked: Tensor) -> list[Tensor]:
        """Of what `pick` gave, N of each route: views, [T, slots * k]."""
        return list(picked[:, : sum(self._widths)].split(self._widths, 1))

    def of_slice(self, picked: Tensor) -> Tensor:
        """Of what `pick` gave, the slice's rows or columns: [T, count]."""
        return picked if self._of_slice is None else self._of_slice.columns(picked)


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
            saved += [p.columns(flat_y) for p in plan.p]
        else:
            # Mixed columns: only the inputs of the columns that train, and x_N for each operator.
            saved.append(plan.pick(flat_x))
        ctx.save_for_backward(weight, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        dy = grad_outputs[0]
        with torch.autocast(dy.device.type, enabled=False):  # dtypes are those of the forward pass
            return _SlicedLinear._backward(ctx, dy)

    @staticmethod
    def _backward(ctx: Any, dy: Tensor) -> Any:
        plan: Plan = ctx.plan
        weight, *saved = ctx.saved_tensors
        need_dx = ctx.needs_input_grad[0] or (plan.dim == 1 and plan.routes)
        dx = dy @ weight.to(dy.dtype) if need_dx else None
        flat_dy = dy.reshape(-1, dy.shape[-1])  # [T, out]
        # The side of the layer on which the operators act, and on which the slice is a part: dy, or x.
        picked = plan.pick(flat_dy) if plan.dim == 0 else saved.pop(0)
        inputs = saved.pop(0) if plan.slice is not None and plan.dim == 0 else None
        # The raw rows or columns of the slice see it as it is, and through M^T where they are of P.
        of_slice = plan.of_slice(picked) if plan.slice is not None else None  # [T, count]
        factors: list[Tensor] = []
        for i, (route, of_n) in enumerate(zip(plan.routes, plan.of_routes(picked), strict=True)):
            if plan.dim == 0:
                of_p = saved[i]
            else:
                assert dx is not None
                of_p = plan.p[i].columns(dx.reshape(-1, dx.shape[-1]))
            factors += route.factors(of_n, of_p)
            if of_slice is not None:
                route.add_back_(of_slice, of_n)
        trained: list[Tensor] = []
        if plan.slice is not None and of_slice is not None:
            if inputs is None:
                trained.append(flat_dy.T @ of_slice)
            else:
                trained.append(of_slice.T @ inputs.reshape(-1, inputs.shape[-1]))
                trained += [of_slice.sum(0)] if plan.slice.bias is not None else []
        everything = [g.view(s) for g, s in zip([*trained, *factors], ctx.shapes, strict=True)]
        return (dx if ctx.needs_input_grad[0] else None, None, None, None, *everything)


def install(layer: nn.Linear, plan: Plan) -> Callable[[], None]:
    """Make `layer` run by `plan`; returns what undoes it. The layer's own weight and bias are frozen by the caller."""

    def forward(x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        trained: list[Tensor] = plan.slice.leaves() if plan.slice is not None else []
        for route in plan.routes:
            trained += list(route.operator.parameters())
        return _SlicedLinear.apply(x, layer.weight, layer.bias, plan, *trained)  # type: ignore[no-any-return]

    return replace_forward(layer, forward)
