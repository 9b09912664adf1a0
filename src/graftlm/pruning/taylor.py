"""First-order Taylor importance: by how much the loss would change if a component went (Adapt-Pruner, section 3.1.2,
eq. 10; LLM-Pruner, section 3.2)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftlm.anatomy import Block
from graftlm.fused_loss import fused_where_it_fits
from graftlm.importance import by_component, supervised, with_labels
from graftlm.modes import evaluating
from graftlm.parts import Part, parts
from graftlm.pruning.base import Batch

FLOAT16_SCALE = 2**10


def taylor(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Importance of every component, by block name: float32 [components].

    The sum over all that goes with it (weights, biases of its rows, norms over all heads) of |gradient| * |value|, the
    gradient being that of the mean loss over all tokens of `batches`. A key-value group is credited with all its own
    query heads. In evaluation mode; products and sums in float32. Where there is one batch, a gradient is gone as soon
    as it is credited; of several, the sums of gradients are held in float32.
    """
    device = next(model.parameters()).device
    scores = {block.name: torch.zeros(block.components, device=device) for block in blocks}
    owners: dict[str, list[tuple[Block, Part]]] = {}
    for block in blocks:
        for part in parts(model, block):
            owners.setdefault(part.path, []).append((block, part))
    sums: dict[str, Tensor] = {}
    inputs = [with_labels({key: value.to(device) for key, value in batch.items()}) for batch in batches]
    tokens = sum(map(supervised, inputs))

    def credit(path: str, gradient: Tensor) -> None:
        parameter = owners[path][0][1].parameter
        products = (gradient.float() * parameter.detach().float()).abs_()
        for block, part in owners[path]:
            along = products if products.dim() == 1 else products.sum(1 - part.matrix.dim)  # [rows] or [columns]
            scores[block.name] += by_component(along, part.matrix, block.components)

    def heard(path: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if len(inputs) == 1:
            credit(path, gradient)
        elif path in sums:
            sums[path] += gradient
        else:
            sums[path] = gradient.float()

    # A gradient of float16 may be too small to be told from 0, and is computed larger.
    scale = FLOAT16_SCALE if model.dtype == torch.float16 else 1
    items = torch.tensor(tokens / scale, device=device)
    owned = {path: found[0][1].parameter for path, found in owners.items()}
    with evaluating(model), fused_where_it_fits(model), _only(model, owned, heard):
        for one in inputs:
            model(**one, num_items_in_batch=items, use_cache=False).loss.backward()
    for path in list(sums):
        credit(path, sums.pop(path))
    return {name: score.div_(scale) for name, score in scores.items()}


@contextmanager
def _only(
    model: nn.Module, wanted: Mapping[str, nn.Parameter], heard: Callable[[str, nn.Parameter], None]
) -> Iterator[None]:
    """Within it only `wanted` have gradients, and heard(path, parameter) is told of each as soon as it is there."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handles = []
    for parameter, _ in required:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        for path, parameter in wanted.items():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(partial(heard, path)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, was in required:
            parameter.requires_grad_(was)
            parameter.grad = None
