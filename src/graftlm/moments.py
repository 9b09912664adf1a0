"""What an optimizer keeps of the entries of a parameter, for those who move or forget some of them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def moments_of(state: Mapping[str, Any], parameter: Tensor) -> list[Tensor]:
    """Views of the optimizer's `state` of `parameter`, in its order, each of the parameter's shape: what is kept of
    every entry. Adam's first moment is the first.

    AdEMAMix of bitsandbytes stacks its two first moments, [2, *parameter.shape]: they are two of the views. A state in
    8 bits or a factored one has none; who needs it refuses those optimizers (RunConfig.state_moves).
    """
    shape, found = parameter.shape, []
    for kept in state.values():
        if isinstance(kept, Tensor) and kept.shape == shape:
            found.append(kept)
        elif isinstance(kept, Tensor) and shape and kept.shape[1:] == shape:
            found += kept.unbind(0)
    return found
