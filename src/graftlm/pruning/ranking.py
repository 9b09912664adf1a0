"""How many components each block keeps: the same in every layer, or what one ranking of all components leaves of it."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from graftlm.pruning.targets import Sizes, Target, apportioned, published


def uniform_counts(target: Target, *, exact: bool) -> dict[str, int]:
    """Components that each block keeps, by name, where every layer keeps the same. Not `exact`: as published, the
    target's sparsity is the share of every block's components that goes."""
    found: dict[str, int] = {}
    for sizes, budget in zip(target.sizes, target.by_kind, strict=True):
        if exact:
            counts = apportioned(sizes, sizes.counts, None, budget)
        else:
            counts = published(sizes, sizes.counts, [target.sparsity] * len(sizes.names))
        found |= zip(sizes.names, counts, strict=True)
    return found


def ranked_counts(sizes: Sequence[Sizes], scores: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Components that each block keeps, by name: their parameters are at most `budget`, and nothing that was removed
    fits in again.

    The weakest of all blocks go first (FLAP's adaptive structure), in steps (targets.Sizes.step), as far as a block's
    floor; of equals, the first block's. What does not fill a step goes before all else. `scores` must be comparable
    between blocks: float [components].
    """
    counts = {name: most for one in sizes for name, most in zip(one.names, one.most, strict=True)}
    step = {name: one.step for one in sizes for name in one.names}
    cost = {name: one.step * each for one in sizes for name, each in zip(one.names, one.costs, strict=True)}
    steps: list[tuple[float, str]] = []  # importance of a step, and its block: those that may go
    for one in sizes:
        for name, most, least in zip(one.names, one.most, one.least, strict=True):
            weakest_first = scores[name].double().sort().values[len(scores[name]) - most :]
            going = weakest_first[: most - least].unflatten(0, (-1, one.step)).mean(1) if most > least else []
            steps += [(float(importance), name) for importance in going]
    steps.sort(key=lambda item: item[0])
    spent = sum(one.parameters([counts[name] for name in one.names]) for one in sizes)
    removed: list[str] = []
    for _, name in steps:
        if spent <= budget:
            break
        counts[name] -= step[name]
        spent -= cost[name]
        removed.append(name)
    for name in reversed(removed):  # the last to go may have been a head, and left room for channels
        if spent + cost[name] <= budget:
            counts[name] += step[name]
            spent += cost[name]
    return counts
