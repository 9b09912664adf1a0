"""ShortGPT: whole layers go, those that change their input least (Men et al. 2024, arXiv 2403.03853).

A layer's block influence is 1 minus the cosine similarity of what enters and what leaves it, averaged over tokens
(eq. 1); the layers with the least go, all in one step. As many as the parameter target needs: the model lands up to one
layer below it, never above. Which layers go is the paper's; that a target decides how many is ours (with `exact:
false` the sparsity is the share of layers that go), and `similarity` may take the cosine's place.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from graftlm.parts import layer_parameters
from graftlm.pruning.base import Calibration, Pruned, PruneStep
from graftlm.pruning.layer_importance import layer_importance
from graftlm.pruning.one_step import Before, kept_as_published, pruned_from
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.surgery import keep_layers, prunable_blocks
from graftlm.pruning.targets import asked_parameters


def prune(
    model: PreTrainedModel, settings: PruneSettings, calibration: Calibration, heard: Callable[[PruneStep], None]
) -> Pruned:
    before, wanted = Before.of(model), asked_parameters(model, settings)
    # Ranked, block influence is the importance of layers of Adapt-Pruner: that is it minus the mean, scaled.
    influence = layer_importance(model, calibration(0), settings.similarity)
    sizes = layer_parameters(model)
    left, stay = before.parameters, set(range(len(sizes)))
    count = kept_as_published(len(sizes), settings)
    for index in influence.argsort(stable=True).tolist():
        if left <= wanted if count is None else len(stay) <= count:
            break
        stay.remove(index)
        left -= sizes[index]
    if count is None and not stay:
        stay = {sizes.index(min(sizes))}
        left += min(sizes)
    ids = sorted(stay)
    kept = {
        block.name: torch.arange(block.components if block.layer in stay else 0) for block in prunable_blocks(model)
    }
    gone = [i for i in range(len(sizes)) if i not in stay]
    note = f"shortgpt: {len(gone)} of {len(sizes)} layers went: {', '.join(map(str, gone)) or 'none'} (counted from 0)"
    if count is None:
        note += f"; a layer is {max(sizes):,} parameters, so the model is {wanted - left:,} below what was asked for"
    model = keep_layers(model, ids)
    importance = tuple(influence.tolist())
    return pruned_from(before, model, settings, kept, heard, layer_importance=importance, notes=(note,))
