"""Running a model as it is, without training it."""

from collections.abc import Iterator
from contextlib import contextmanager

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
