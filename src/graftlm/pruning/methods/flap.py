"""FLAP: what fluctuates little can be replaced by its mean (An et al., AAAI 2024, arXiv 2312.11983).

The metric of an input channel of an output projection is the variance of its values over tokens times the squared norm
of its column (the weighted input feature variance, WIFV, of the paper and its code). Within each layer's attention and
each layer's FFN the metrics are standardised, which makes them comparable; a head's is the mean of its channels'. One
ranking of all heads and channels of all layers, weighted by their parameters, gives every layer its width (the code's
AL-AM). What a removed channel gives on average goes on as a bias of the projection: exact for constant inputs.

We differ from the authors' code (CASIA-IVA-Lab/FLAP): the unit of attention is a key-value group; its metric is not
squared a second time before it is standardised (theirs squares that of attention only, and the paper does not); the
ranking stops exactly at the target, the biases counted (with `exact: false` not, as theirs); all statistics are of the
unpruned model, over tokens that are not padding. Biases make every layer's config say `output_biases`, which is no
stock class: `flap_compensation: false` leaves them out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftlm.anatomy import Block, linear
from graftlm.importance import by_component
from graftlm.pruning.base import Batch, Calibration, Pruned, PruneStep
from graftlm.pruning.inputs import column_norms, watch_inputs
from graftlm.pruning.one_step import Before, pruned_from
from graftlm.pruning.prune import check_finite, strongest
from graftlm.pruning.ranking import ranked_counts, uniform_counts
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.surgery import add_output_biases, keep_components, prunable_blocks
from graftlm.pruning.targets import find_target


@dataclass
class Moments:
    """Mean and variance of columns, taken in batch by batch (Chan et al.'s update): float64 [columns]."""

    mean: Tensor
    squares: Tensor
    """Sum of squared differences from the mean."""
    count: int = 0

    def add(self, rows: Tensor) -> None:
        """Take in `rows` [n, columns]."""
        rows, n = rows.double(), len(rows)
        if not n:
            return
        mean, whole = rows.mean(0), self.count + n
        gap = mean - self.mean
        self.squares += (rows - mean).square().sum(0) + gap.square() * (self.count * n / whole)
        self.mean += gap * (n / whole)
        self.count = whole

    @property
    def variance(self) -> Tensor:
        """Unbiased: float64 [columns]; 0 of a single row."""
        return self.squares / max(1, self.count - 1)


def input_moments(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Batch]) -> dict[str, Moments]:
    """Of the inputs of every block's output projection, over tokens."""
    found: dict[str, Moments] = {}

    def see(block: Block, inputs: Tensor, mask: Tensor) -> None:
        rows = inputs[mask]
        if block.name not in found:
            zeros = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
            found[block.name] = Moments(zeros, zeros.clone())
        found[block.name].add(rows)

    watch_inputs(model, blocks, batches, see)
    return found


def fluctuation(model: PreTrainedModel, block: Block, moments: Moments) -> Tensor:
    """Importance of the block's components, comparable between blocks: float32 [components].

    Variance times squared column norm, minus the mean over the block's columns, divided by their standard deviation
    (0 where they do not differ); averaged over a component's columns.
    """
    metric = moments.variance * column_norms(model, block).double()
    deviation = metric.std() if len(metric) > 1 else torch.zeros_like(metric[0])
    standard = torch.where(deviation > 0, (metric - metric.mean()) / deviation, 0)
    columns = block.slots * block.width
    return (by_component(standard, block.output, block.components) / columns).float().cpu()


@torch.no_grad()
def compensation(model: PreTrainedModel, block: Block, moments: Moments, kept: Tensor) -> Tensor:
    """What the components that are not in `kept` [n] give to the residual stream on average: float64 [hidden size]."""
    gone = torch.ones(block.components, dtype=torch.bool)
    gone[kept.cpu()] = False
    columns = gone.repeat_interleave(block.slots * block.width).to(moments.mean.device)
    weight = linear(model, block.output.module).weight
    return weight[:, columns].double() @ moments.mean[columns]


def prune(
    model: PreTrainedModel, settings: PruneSettings, calibration: Calibration, heard: Callable[[PruneStep], None]
) -> Pruned:
    """One step. With `uniform` every layer keeps the same numbers, and the metric only says which."""
    before = Before.of(model)
    blocks = prunable_blocks(model)
    target = find_target(model, settings, uniform=bool(settings.uniform))
    moments = input_moments(model, blocks, calibration(0))
    check_finite({name: own.squares for name, own in moments.items()})  # NaN leaves no deviation to divide by
    scores = {block.name: fluctuation(model, block, moments[block.name]) for block in blocks}
    if settings.uniform:
        counts = uniform_counts(target, exact=settings.exact)
    else:
        counts = ranked_counts(target.sizes, scores, target.budget)
    kept = {block.name: torch.arange(block.components) for block in blocks} | strongest(scores, counts)
    biases = _biases(model, blocks, moments, kept, len(before.shapes)) if settings.flap_compensation else {}
    model = keep_components(model, kept)
    if biases:
        model = add_output_biases(model, biases)
    return pruned_from(before, model, settings, kept, heard)


def _biases(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    moments: Mapping[str, Moments],
    kept: Mapping[str, Tensor],
    layers: int,
) -> dict[int, tuple[Tensor | None, Tensor | None]]:
    found: dict[int, list[Tensor | None]] = {layer: [None, None] for layer in range(layers)}
    for block in blocks:
        half = int(block.kind == "channels")
        found[block.layer][half] = compensation(model, block, moments[block.name], kept[block.name])
    return {layer: (attention, feed_forward) for layer, (attention, feed_forward) in found.items()}
