"""LLM-Pruner (Ma et al., 2023): Taylor importance, every layer the same share, in one step.

As Adapt-Pruner's tables compare with it: all layers are pruned (its authors spare a model's first and last), and a
key-value group is credited with its own query heads.
"""

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
    allocate = allocation(settings, uniform=True)
    iterations = iterations_of(settings)
    return iterate(model, settings, calibration, heard, measure=taylor, allocate=allocate, iterations=iterations)
