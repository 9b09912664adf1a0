"""How far a stage moves the disadvantageous weights: through the operator, and by their own update.

Both are root mean squares over the same rows (or columns) of N, at most ROWS of each matrix: all that is kept of a
stage's start are those, so that it costs a stage next to no memory and a step no time.
"""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from graftlm.operators import stacked
from graftlm.sharding import root_mean_square

if TYPE_CHECKING:
    from graftlm.apex import Apex
    from graftlm.expansion import Mixed

ROWS = 16
"""Of a matrix's N, spread evenly."""
ALL = "all"


def some_rows(panel: Tensor) -> Tensor:
    """A float copy of at most ROWS rows of a panel [slots, k, other]: [slots, at most ROWS, other]."""
    k = panel.shape[1]
    rows = torch.linspace(0, k - 1, min(k, ROWS)).round().long().to(panel.device)
    return panel.index_select(1, rows).float()


@torch.no_grad()
def stage_movement(apex: "Apex") -> dict[str, Any]:
    """Of the stage so far, before it is fused: by role of the mixed matrices (v, o, up, gate, down), and of all of them
    together, the root mean square of

        operator   M W[P], which the operator adds to W[N]
        own        W[N] now minus W[N] at the stage's start; None where that was not kept (an older checkpoint)
        weight     W[N] at present

    Empty where nothing is expanded. All processes take part where weights are sharded.
    """
    found: dict[str, list[tuple[Tensor, Tensor | None, Tensor, bool]]] = {}
    for expansion in apex.expansions:
        for mixed in expansion.mixed():
            sharded = isinstance(apex.model.get_parameter(mixed.piece.name), DTensor)
            found.setdefault(mixed.piece.matrix.role, []).append((*_rows_of(mixed), sharded))
    if found:
        found[ALL] = [one for several in list(found.values()) for one in several]
    return {role: _told(several) for role, several in found.items()}


def _rows_of(mixed: "Mixed") -> tuple[Tensor, Tensor | None, Tensor]:
    kept_p = mixed.raw_p()
    raw_p = (mixed.placed.p.take(mixed.weight) if kept_p is None else kept_p).to(mixed.tie.dtype)
    operator = mixed.tie.operator
    shared = [parameter.expand(len(raw_p), *parameter.shape[1:]) for parameter in stacked([operator])]
    now = some_rows(mixed.raw_n())
    start = mixed.expansion.start.get(mixed.piece.key)
    return some_rows(operator.product(shared, raw_p)), None if start is None else now - start, now


def _told(several: Sequence[tuple[Tensor, Tensor | None, Tensor, bool]]) -> dict[str, float | None]:
    operator, own, weight, sharded = zip(*several, strict=True)
    return {
        "operator": root_mean_square(operator, sharded),
        "own": None if any(panel is None for panel in own) else root_mean_square(own, sharded),
        "weight": root_mean_square(weight, sharded),
    }


def rate_multipliers(apex: "Apex") -> dict[str, float]:
    """Operator learning rate over the learning rate in this stage: lowest, median and highest of all operators. Empty
    without operators."""
    found = apex.rates.multipliers
    return {"lowest": min(found), "median": statistics.median(found), "highest": max(found)} if found else {}
