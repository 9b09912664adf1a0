"""How much heads and channels weigh, by their weights or by their gradients: measures besides activations.

A component's energy in a matrix is the squared Frobenius norm of its rows or columns there. Matrices of one block
differ in scale, so each counts relative to the mean of its components.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graftlm.anatomy import Block, Matrix, linear
from graftlm.modes import checkpointing, evaluating
from graftlm.panels import local
from graftlm.samples import IGNORED
from graftlm.sharding import is_first, is_sharded, sum_gradients, summed


def energies(values: Tensor, matrix: Matrix, components: int) -> Tensor:
    """Squared Frobenius norm of each component's rows or columns of `values`, which has the shape of the layer's weight
    (or of this process's shard of it, which is split along the other dimension): float64 [components]."""
    # [rows] or [columns]; of bfloat16 values, in float32.
    norms = torch.linalg.vector_norm(values, dim=1 - matrix.dim, dtype=torch.promote_types(values.dtype, torch.float32))
    return by_component(norms.double().square(), matrix, components)


def by_component(values: Tensor, matrix: Matrix, components: int) -> Tensor:
    """Sums over each component of `values` [rows or columns of the layer], one for each index of `matrix.dim`."""
    mine = values[matrix.offset :][: components * matrix.slots * matrix.width]
    return mine.view(components, -1).sum(1)


def with_labels(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch, with every token that is not padding as its label where none is supervised."""
    if "labels" in inputs and not bool((inputs["labels"][:, 1:] == IGNORED).all()):
        return dict(inputs)
    labels, mask = inputs["input_ids"], inputs.get("attention_mask")
    return {**inputs, "labels": labels if mask is None else labels.masked_fill(mask == 0, IGNORED)}


def supervised(inputs: Mapping[str, Tensor]) -> int:
    """Tokens of a batch that its loss is the mean over."""
    return int((inputs["labels"][:, 1:] != IGNORED).sum())


def scores_of(block: Block, by_matrix: Tensor) -> Tensor:
    """Scores as choose() takes them (advantage.py), float64 [ranked], from the energies [matrices, components] of the
    block's mixed matrices: a component's is divided evenly among its heads."""
    mean = by_matrix.mean(1, keepdim=True)
    relative = torch.where(mean > 0, by_matrix / mean, 0).sum(0)  # [components]
    return (relative / block.slots).repeat_interleave(block.slots).cpu()


@torch.no_grad()
def weight_scores(model: nn.Module, blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Scores by weight magnitude, of every block by name: float64 [ranked]. All processes must ask."""
    found = {
        block.name: torch.stack([
            energies(local(linear(model, m.module).weight), m, block.components) for m in block.mixed
        ])
        for block in blocks
    }  # fmt: skip
    if is_sharded(model):
        found = summed(found, next(iter(found.values())).device)
    return {block.name: scores_of(block, found[block.name]) for block in blocks}


class GradientScores:
    """Energies of gradients, summed over optimizer steps (or over batches before training)."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block]):
        self._model = model
        self._blocks = list(blocks)
        self.reset()

    def reset(self) -> None:
        self.count = 0
        """Gradients seen."""
        self._sums = {
            block.name: torch.zeros(len(block.mixed), block.components, dtype=torch.float64) for block in self._blocks
        }

    def _weights(self) -> Iterator[nn.Parameter]:
        layers = (linear(self._model, matrix.module) for block in self._blocks for matrix in block.mixed)
        return (cast(nn.Parameter, layer.weight) for layer in layers)

    @torch.no_grad()
    def add(self) -> None:
        """Count the gradients that the model holds now. Those of a module that has none count as zero."""
        for block in self._blocks:
            for row, matrix in enumerate(block.mixed):
                gradient = linear(self._model, matrix.module).weight.grad
                if gradient is not None:
                    sums = self._sums[block.name]
                    if sums.device != gradient.device:
                        self._sums[block.name] = sums = sums.to(gradient.device)
                    sums[row] += energies(local(gradient), matrix, block.components)
        self.count += 1

    def run(self, batches: Iterable[Mapping[str, Tensor]]) -> int:
        """Count the gradient of every batch (input_ids [B, S] and what else the model takes; where none of its tokens
        is supervised, all are) in evaluation mode, averaged over the processes' batches; returns the rows seen.
        Gradients that the model holds are lost."""
        model, rows = self._model, 0
        device = next(model.parameters()).device
        with evaluating(model):
            checkpointing(model)
            model.zero_grad()
            for batch in batches:
                inputs = with_labels({key: value.to(device) for key, value in batch.items()})
                model(**inputs, use_cache=False).loss.backward()
                if not is_sharded(model) and dist.is_initialized():
                    sum_gradients(dict.fromkeys(self._weights()), mean=True)
                self.add()
                model.zero_grad()
                rows += len(inputs["input_ids"])
        return rows

    def scores(self) -> dict[str, Tensor]:
        """Scores by gradient, of every block by name: float64 [ranked]. All processes must ask."""
        whole = self._whole()
        return {block.name: scores_of(block, whole[block.name]) for block in self._blocks}

    def _whole(self) -> dict[str, Tensor]:
        if not is_sharded(self._model):
            return self._sums
        return summed(self._sums, next(self._model.parameters()).device)

    def state(self) -> dict[str, Tensor]:
        """Everything counted so far, over all processes. All must ask."""
        return {**self._whole(), "count": torch.tensor(self.count)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.count = int(state["count"])
        mine = is_first() or not is_sharded(self._model)  # parts are summed
        self._sums = {name: state[name].clone() if mine else torch.zeros_like(state[name]) for name in self._sums}
