"""A model computed more exactly than its weights are held, and rounded on the way as llama.cpp rounds: what a file is
checked against."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor, nn
from transformers import PreTrainedModel


def rounded(tensor: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """`tensor` [..., n] to a number format of GGUF and back: the numbers that the format holds, in `tensor`'s dtype.
    Blocks run along n, which the format's block must divide."""
    if tensor.numel() == 0:
        return tensor
    there = quants.quantize(np.ascontiguousarray(tensor.detach().float().cpu().numpy()), kind)
    return torch.from_numpy(quants.dequantize(there, kind).copy()).to(tensor)


@contextmanager
def computing(model: PreTrainedModel, dtype: torch.dtype, kind: GGMLQuantizationType | None = None) -> Iterator[None]:
    """Within the context `model` computes in `dtype`: each module's weights are cast while it runs, so that only one
    module's are in memory twice, and are as they were before when it has run.

    `kind`: with what a file of that kind makes of the matrices, and, as llama.cpp's products on a CPU do, with each
    product's input rounded to it, token by token; sums are not rounded.
    """
    modules = [module for module in model.modules() if dict(module.named_parameters(recurse=False))]
    held: dict[nn.Parameter, Tensor] = {}

    def before(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        for parameter in module.parameters(recurse=False):
            held[parameter] = parameter.data
            parameter.data = parameter.data.to(dtype)
        if kind is None or not isinstance(module, nn.Linear | nn.Embedding):
            return given
        module.weight.data = rounded(module.weight.data, kind)
        return (rounded(given[0], kind), *given[1:]) if isinstance(module, nn.Linear) else given

    def after(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = held.pop(parameter)

    hooks = [module.register_forward_pre_hook(before) for module in modules]
    hooks += [module.register_forward_hook(after) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in held.items():  # of a forward that did not end
            parameter.data = data
