"""How a model is run: without training it, in mixed precision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from graftlm.sharding import reshard


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it `model` is in evaluation mode; afterwards, whatever happens, it is in the mode that it was in, and
    sharded weights are sharded again."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        reshard(model)


def checkpointing(model: nn.Module) -> None:
    """Let layers with gradient checkpointing do it in evaluation mode, too, which transformers does not: they alone are
    told that they train, and not what is in them (dropout). `evaluating` takes it back."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and isinstance(module, GradientCheckpointingLayer):
            module.training = True


def replace_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Let `module` run `forward(x)` in the place of its class's own; returns what undoes it. A deep copy of it, which
    `forward` knows nothing of, runs its class's own on its own weights."""
    own = type(module).forward

    def replaced(self: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = forward(x) if self is module else own(self, x)
        return result

    module.forward = MethodType(replaced, module)  # type: ignore[method-assign]

    def undo() -> None:
        module.__dict__.pop("forward", None)

    return undo


def mixed(model: nn.Module, bf16: bool) -> torch.autocast:
    """The autocast of a run with `bf16`, where `model` lies."""
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bf16)
