"""Control: components go by chance (settings.seed)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftlm.anatomy import Block
from graftlm.pruning.base import Batch, Calibration, Pruned, PruneStep
from graftlm.pruning.prune import ranked_by
from graftlm.pruning.settings import PruneSettings


def prune(
    model: PreTrainedModel, settings: PruneSettings, calibration: Calibration, heard: Callable[[PruneStep], None]
) -> Pruned:
    generator = torch.Generator().manual_seed(settings.seed)

    def measure(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Batch]) -> dict[str, Tensor]:
        return {block.name: torch.rand(block.components, generator=generator) for block in blocks}

    return ranked_by(measure)(model, settings, calibration, heard)
