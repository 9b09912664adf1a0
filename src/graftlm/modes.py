"""How a model is run: without training it, in mixed precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

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


def mixed(model: nn.Module, bf16: bool) -> torch.autocast:
    """The autocast of a run with `bf16`, where `model` lies."""
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bf16)
