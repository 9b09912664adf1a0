"""Loss on data that is not trained on."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from graftlm.modes import evaluating
from graftlm.samples import IGNORED
from graftlm.sharding import is_sharded, summed


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, counting: int | None = None) -> float:
    """Mean cross-entropy in nats over all supervised tokens of `batches`, of all processes together; the model's mode
    is put back.

    counting: only so many of the batches count; the others are there because a sharded model is run by all processes
    together, and some have fewer batches. None: all.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0.0
    with evaluating(model):
        for number, batch in enumerate(batches):
            inputs = {k: v.to(device) for k, v in batch.items()}
            counts = counting is None or number < counting
            supervised = int((inputs["labels"][:, 1:] != IGNORED).sum()) if counts else 0
            if supervised or is_sharded(model):
                loss = model(**inputs, use_cache=False).loss
                if supervised:
                    total += float(loss) * supervised
                    count += supervised
    found = summed({"losses": torch.tensor([total, count], dtype=torch.float64)}, device)
    total, count = found["losses"].tolist()
    return total / count if count else float("nan")
