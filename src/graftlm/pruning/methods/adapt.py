"""Adapt-Pruner: each layer loses what its importance leaves it to lose, in many small iterations (section 3.1)."""

from collections.abc import Callable

from transformers import PreTrainedModel

from graftlm.pruning.base import Calibration, Pruned, PruneStep
from graftlm.pruning.layer_sparsity import allocation
from graftlm.pruning.prune import iterate
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.taylor import taylor
from graftlm.pruning.ways import iterations_of


def prune(
    model: PreTrainedModel, settings: PruneSettings, calibration: Calibration, heard: Callable[[PruneStep], None]
) -> Pruned:
    allocate = allocation(settings, uniform=False)
    iterations = iterations_of(settings)
    return iterate(model, settings, calibration, heard, measure=taylor, allocate=allocate, iterations=iterations)
