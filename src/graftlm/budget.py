"""How many components train when not everything does (section 4.1: half and small parameter fine-tuning)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from graftlm.advantage import Choice
from graftlm.anatomy import Anatomy, Block, Matrix, linear
from graftlm.errors import UserError
from graftlm.parts import count_parameters


@dataclass
class Counts:
    """Components of one block that train: the lowest of N, the highest of P, the lowest of what is between."""

    n: int = 0
    p: int = 0
    rest: int = 0

    def pick(self, choice: Choice, size: int) -> Tensor:
        """Those components, ascending: int64 [n + p + rest]."""
        lowest = choice.order.flip(0)
        between = lowest[size : len(lowest) - size]
        return torch.cat([lowest[: self.n], choice.order[: self.p], between[: self.rest]]).sort().values


@dataclass
class Budget:
    """What trains, the same in every stage: scores decide only which components fill the counts."""

    total: int
    """Parameters of the model, operators not among them."""
    operators: int
    trainable: int
    """Everything that trains, operators included."""
    followers: bool = False
    """q and k rows of the same heads train too."""
    embeddings: bool = False
    """Embeddings and LM head train too."""
    blocks: dict[str, Counts] = field(default_factory=dict)
    """Counts by block name; empty when everything trains."""

    @property
    def fraction(self) -> float:
        return self.trainable / self.total


def matrices_that_train(block: Block, followers: bool) -> tuple[Matrix, ...]:
    return block.mixed + (block.followers if followers else ())


def component_size(model: nn.Module, block: Block, followers: bool) -> int:
    """Parameters of one component of `block`: its rows and columns, and bias entries where rows have them."""
    size = 0
    for matrix in matrices_that_train(block, followers):
        layer = linear(model, matrix.module)
        other = layer.weight.shape[1 - matrix.dim] + (1 if matrix.dim == 0 and layer.bias is not None else 0)
        size += matrix.slots * matrix.width * other
    return size


def embedding_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Input embeddings and LM head, once where they are tied."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    unique = {id(m.weight): m.weight for m in modules if m is not None}
    return list(unique.values())


def plan_budget(
    model: nn.Module,
    anatomy: Anatomy,
    sizes: Mapping[str, int],
    operators: int,
    regime: str,
    share: float,
    *,
    n_first: bool = False,
) -> Budget:
    """Fill the budget `share` of all parameters: operators, then (half) embeddings and LM head, then components.

    Components come most extreme first, N and P of all layers alternating, then (half) the next lowest ones; what no
    longer fits is passed over, so the smallest component, a channel, decides how closely the budget is met. `n_first`:
    N before P, where N has to train whole.
    """
    total = count_parameters(model)
    half = regime == "half"
    budget = Budget(total, operators, operators, followers=half, embeddings=half)
    if regime == "full":
        budget.trainable = total + operators
        return budget
    if half:
        budget.trainable += sum(p.numel() for p in embedding_parameters(model))
    limit = round(share * total)
    if budget.trainable > limit:
        what = "operators, embeddings and LM head" if half else "operators"
        raise UserError(
            f"apex.budget: {share:.4g} of {total:,} parameters cannot hold the {what} alone "
            f"({budget.trainable / total:.4g}); raise it, lower apex.k_channels, or choose another apex.trains"
        )
    order: list[tuple[int, float, int, int, Block, str]] = []
    for block in anatomy.blocks:
        budget.blocks[block.name] = Counts()
        size = sizes[block.name]
        between = block.components - 2 * size if half else 0
        kind = anatomy.kinds.index(block.kind)
        for tier, side, count in ((0, "n", size), (int(n_first), "p", size), (2, "rest", between)):
            order += [(tier, (j + 0.5) / count, kind, block.layer, block, side) for j in range(count)]
    order.sort(key=lambda item: item[:4])
    costs = {block.name: component_size(model, block, budget.followers) for block in anatomy.blocks}
    for *_, block, side in order:
        if budget.trainable + costs[block.name] <= limit:
            budget.trainable += costs[block.name]
            counts = budget.blocks[block.name]
            setattr(counts, side, getattr(counts, side) + 1)
    return budget
