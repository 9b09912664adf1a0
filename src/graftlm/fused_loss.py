"""Cross-entropy of a language model without ever holding all its logits.

Tokens go through the LM head some at a time, and the gradients of those are taken at once, so that memory grows with
the number of tokens in a chunk and not of a batch, and no product is done twice. torch's own linear_cross_entropy does
the same, but returns the loss of bfloat16 weights in bfloat16, has no softcapping, and its default chunks are so small
that it takes six times as long on a CPU.

Shapes: T tokens, d hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from graftlm.anatomy import FAMILIES, SLICED, model_family
from graftlm.errors import UserError
from graftlm.samples import IGNORED

LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}
"""Values of a chunk, by kind of device; two tables of as many are alive at a time. A CPU's caches want it small. On a
GPU every chunk reads the whole LM head and rewrites its gradient, which takes longer than the products where a chunk
has few tokens."""


def logits_at_once(device_type: str) -> int:
    """Values of a chunk on such a device."""
    return LOGITS_AT_ONCE.get(device_type, LOGITS_AT_ONCE["cuda"])


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    """The sum over tokens of cross_entropy(hidden @ weight.T): a float32 scalar.

    Args:
        hidden: [T, d].
        weight: [V, d], in the dtype of `hidden`.
        targets: int64 [T]; -100 counts nothing.
        softcap: logits x become softcap * tanh(x / softcap).
    """
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, softcap, torch.is_grad_enabled())
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, train: bool
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # With few bits, the sum over chunks is kept in more; a single product sums in more inside, too.
        to_hidden = torch.empty_like(hidden) if train and ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight, dtype=wide) if train and ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):
            rows = max(1, logits_at_once(weight.device.type) // len(weight))
            for x, y, place in zip(hidden.split(rows), targets.split(rows), range(0, len(hidden), rows), strict=True):
                logits = (x @ weight.t()).to(wide)  # [tokens of the chunk, V]
                if softcap is not None:
                    logits.div_(softcap).tanh_().mul_(softcap)
                target = y.clamp(min=0)[:, None]
                kept = (y != IGNORED)[:, None].to(wide)
                slope = None if softcap is None or not train else 1 - (logits / softcap).square_()
                logits -= logits.amax(1, keepdim=True)
                of_target = logits.gather(1, target)
                norm = logits.exp_().sum(1, keepdim=True)
                total += ((norm.log() - of_target) * kept).sum()
                if to_hidden is None and to_weight is None:
                    continue
                # The same table becomes the gradient: softmax minus one at the target.
                logits.mul_(kept / norm).scatter_add_(1, target, -kept)
                if slope is not None:
                    logits.mul_(slope)
                grad = logits.to(hidden.dtype)
                if to_hidden is not None:
                    torch.mm(grad, weight, out=to_hidden[place : place + rows])
                if to_weight is not None and wide == hidden.dtype:
                    to_weight.addmm_(grad.t(), x)
                elif to_weight is not None:
                    to_weight += grad.t() @ x
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        to_hidden, to_weight = ctx.saved_tensors
        return (
            None if to_hidden is None else to_hidden * grad.to(to_hidden.dtype),
            # Nobody else has it, and it is as large as the LM head: it is scaled where it lies.
            None if to_weight is None else to_weight.mul_(grad).to(ctx.dtype),
            None,
            None,
            None,
        )


def unfit(model: PreTrainedModel) -> str | None:
    """Why the loss of `model` cannot be fused; None where it can."""
    family = model_family(model).removeprefix(SLICED)  # their heads and logits are the stock family's
    if family not in FAMILIES:
        return f"family {family} may do more to its logits than is known here"
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None or "forward" in vars(head):
        return "the LM head is no plain nn.Linear without bias"
    return None


class FusedLoss:
    """While installed, a forward pass with `labels` computes its loss in chunks and gives no logits.

    It happens inside the LM head's own forward, where sharded weights (FSDP) are whole. Passes without labels are as
    before.
    """

    def __init__(self, model: PreTrainedModel):
        """Raises UserError where the model's loss cannot be fused."""
        if reason := unfit(model):
            raise UserError(f"fused_loss: {reason}; set fused_loss: false")
        self._model = model
        self._config: Any = model.config.get_text_config()
        self._softcap: float | None = getattr(self._config, "final_logit_softcapping", None)
        self._head = cast(nn.Linear, model.get_output_embeddings())
        self._given: dict[str, Any] | None = None
        self._own: Any = vars(model).get("_loss_function")
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        self._head.forward = self._forward  # type: ignore[method-assign, assignment]
        self._was = model.loss_function
        model.loss_function = self._loss

    def _begin(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self._given = kwargs if kwargs.get("labels") is not None else None
        if self._given is not None and self._softcap is not None:
            self._config.final_logit_softcapping = None  # what the head returns is the loss

    def _forward(self, hidden: Tensor) -> Tensor:
        given, weight = self._given, self._head.weight
        if given is None:
            return F.linear(hidden, weight)
        targets = given.get("shift_labels")
        if targets is None:
            targets = F.pad(given["labels"], (0, 1), value=IGNORED)[..., 1:]
        if targets.shape != hidden.shape[:-1]:
            raise ValueError(f"labels {tuple(targets.shape)} and logits {tuple(hidden.shape[:-1])} differ in shape")
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        targets = targets.reshape(-1).to(hidden.device)
        total = self._sum(hidden.flatten(0, -2), weight, targets)
        items = given.get("num_items_in_batch")
        loss = total / ((targets != IGNORED).sum() if items is None else items)
        return loss.view(1, 1, 1)  # in the place of logits

    def _sum(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """The sum of the tokens' losses, of the arguments that linear_cross_entropy has."""
        return linear_cross_entropy(hidden, weight, targets, self._softcap)

    def _loss(self, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = logits.view(()) if self._given is not None else self._was(logits, *args, **kwargs)
        return result

    def _end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._given is None:
            return
        self._given = None
        if self._softcap is not None:
            self._config.final_logit_softcapping = self._softcap
        if output is not None and hasattr(output, "logits"):
            output.logits = None

    def close(self) -> None:
        """Give the model its own loss back."""
        for handle in self._handles:
            handle.remove()
        del self._head.forward
        if self._own is None:
            vars(self._model).pop("_loss_function", None)
        else:
            self._model._loss_function = self._own


@contextmanager
def fused_where_it_fits(model: PreTrainedModel, *, wanted: bool = True) -> Iterator[None]:
    """Within it the loss of `model` is a FusedLoss, if it can be and is `wanted`."""
    fused = FusedLoss(model) if wanted and unfit(model) is None else None
    try:
        yield
    finally:
        if fused is not None:
            fused.close()
