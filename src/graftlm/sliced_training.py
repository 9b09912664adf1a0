"""A whole model of which only slices, operators and perhaps the embeddings train (budgets below 100%)."""

from collections.abc import Callable, Mapping, Sequence
from math import gcd

import torch
from torch import Tensor, nn

from graftlm.advantage import Choice
from graftlm.anatomy import Block, Matrix, linear
from graftlm.budget import Budget, embedding_parameters, matrices_that_train
from graftlm.errors import UserError
from graftlm.expansion import Expansion
from graftlm.panels import local
from graftlm.scattering import GradientScatter
from graftlm.sharding import is_sharded
from graftlm.slices import Plan, Route, Slice, install


def _key(module: str) -> str:
    return module.replace(".", "-")  # a ModuleDict's keys hold no dots


class SlicedTraining(nn.Module):
    """Freezes `model` and makes the slices of `budget` trainable; which components they are, `choose` says by stage."""

    def __init__(self, model: nn.Module, budget: Budget, expansions: Sequence[Expansion]):
        super().__init__()
        self._model = [model]  # in a list, so that it does not become a submodule of its own submodule
        self._budget = budget
        self._expansions = list(expansions)
        counts: dict[str, int] = {}
        self._dims: dict[str, int] = {}
        self._widths: dict[str, int] = {}
        for expansion in self._expansions:
            expansion.sliced = True
            block = expansion.block
            count = budget.blocks[block.name]
            size = count.n + count.p + count.rest
            for matrix in matrices_that_train(block, budget.followers):
                counts[matrix.module] = counts.get(matrix.module, 0) + size * matrix.slots * matrix.width
                self._dims[matrix.module] = matrix.dim
                # A module may hold several matrices.
                self._widths[matrix.module] = gcd(self._widths.get(matrix.module, 0), matrix.width, matrix.offset)
            for tie in expansion.ties:
                tie.by_tokens = tie.k > count.n * block.width
                if tie.by_tokens and tie.scale_n is not None:
                    raise UserError(
                        "apex.authors_diagonals: needs N to train whole, and the budget does not hold it in layer "
                        f"{block.layer} ({block.kind}); raise apex.budget, lower apex.k_{block.kind}, or train in full"
                    )
                if tie.k > count.p * block.width:
                    tie.leave_p()
        self._scatter = GradientScatter() if is_sharded(model) else None
        self.slices = nn.ModuleDict(
            {_key(m): Slice(linear(model, m), self._dims[m], n) for m, n in counts.items() if n > 0}
        )
        if self._scatter is not None:
            for module, layer in self._layer_of().items():
                found = self.slice_of(module)
                if found is not None:
                    found.scattered_by(self._scatter, layer)
        # Only now, when nothing can fail any more and leave the model frozen.
        self._trained_before = [(p, p.requires_grad) for p in model.parameters()]
        model.requires_grad_(False)
        if budget.embeddings:
            for parameter in embedding_parameters(model):
                parameter.requires_grad_(True)
        self._plans: dict[str, Plan] = {}
        self._undo: list[Callable[[], None]] = []

    def all(self) -> list[Slice]:
        return [found for found in self.slices.values() if isinstance(found, Slice)]

    def most_in_a_layer(self) -> int:
        """Bytes of the slices' weights of the layer where they are most."""
        layer_of = self._layer_of()
        sizes = dict.fromkeys(layer_of.values(), 0)
        for module, layer in layer_of.items():
            found = self.slice_of(module)
            sizes[layer] += found.weight.nbytes if found is not None else 0
        return max(sizes.values())

    def slice_of(self, module: str) -> Slice | None:
        if _key(module) not in self.slices:
            return None
        found = self.slices[_key(module)]
        assert isinstance(found, Slice)
        return found

    def _layers(self) -> list[tuple[Block, Matrix]]:
        return [(e.block, m) for e in self._expansions for m in matrices_that_train(e.block, self._budget.followers)]

    def _layer_of(self) -> dict[str, int]:
        return {matrix.module: block.layer for block, matrix in self._layers()}

    def choose(self, choices: Mapping[str, Choice], sizes: Mapping[str, int]) -> None:
        """Start of a stage: take the slices' values from the model and lay the operators' routes."""
        model = self._model[0]
        indices: dict[str, list[Tensor]] = {}
        for block, matrix in self._layers():
            picked = self._budget.blocks[block.name].pick(choices[block.name], sizes[block.name])
            indices.setdefault(matrix.module, []).append(matrix.index(picked).flatten())
        for module, parts in indices.items():
            found = self.slice_of(module)
            if found is not None:
                found.choose(linear(model, module), torch.cat(parts).sort().values, self._widths[module])
        self.lay_routes(choices)

    def lay_routes(self, choices: Mapping[str, Choice]) -> None:
        """Point every layer's plan at its slice and at the operators whose gradient is read off in it."""
        routes: dict[str, list[Route]] = {}
        for expansion in self._expansions:
            choice = choices[expansion.block.name]
            for tie in expansion.ties:
                if not tie.by_tokens:
                    continue
                for matrix in tie.matrices:
                    device = linear(self._model[0], matrix.module).weight.device
                    n, p = (matrix.index(c).to(device) for c in (choice.disadvantageous, choice.advantageous))
                    routes.setdefault(matrix.module, []).append(Route(tie.operator, n, p))
        for module in dict.fromkeys([m.module for _, m in self._layers()]):
            found, here = self.slice_of(module), routes.get(module, [])
            if module in self._plans:
                self._plans[module].lay(here)
            elif found is not None or here:
                self._plans[module] = plan = Plan(found, self._dims[module], self._widths[module])
                plan.lay(here)
                self._undo.append(install(linear(self._model[0], module), plan))

    def write(self) -> None:
        """Write what trained into the model's weights, rounded to their dtype, and into the kept raw panels."""
        for module in self._dims:
            found = self.slice_of(module)
            if found is not None:
                found.write(linear(self._model[0], module))
        for expansion in self._expansions:
            for mixed in expansion.mixed():
                module, _, kind = mixed.piece.name.rpartition(".")
                found = self.slice_of(module)
                if found is not None:
                    mixed.renew(local(getattr(found, kind)), found.places)

    def finish_gradients(self) -> None:
        """After the last backward pass of a step: wait for gradients that are still on their way to their shards."""
        if self._scatter is not None:
            self._scatter.finish()

    def gradient(self, name: str) -> tuple[Tensor, Tensor | None] | None:
        """The gradient of the slice of the parameter `name`, with the places of its rows or columns (expansion.py)."""
        module, _, kind = name.rpartition(".")
        found = self.slice_of(module)
        if found is None:
            return None
        parameter = getattr(found, kind)
        return None if parameter is None or parameter.grad is None else (parameter.grad, found.places)

    def close(self) -> None:
        """Make the model an ordinary one again."""
        for undo in self._undo:
            undo()
        self._undo, self._plans = [], {}
        for parameter, trained in self._trained_before:
            parameter.requires_grad_(trained)
