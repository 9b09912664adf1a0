"""Learning from a teacher's predictions, without ever holding all logits of either model.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; as Minitron uses it (Sreenivas
et al. 2024, arXiv 2408.11796). The teacher runs without gradients on the same batch; then tokens go through both LM
heads some at a time, as in fused_loss.py.

Shapes: T tokens, d and d' hidden sizes of model and teacher, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from graftlm.errors import UserError
from graftlm.fused_loss import FusedLoss, logits_at_once, unfit
from graftlm.samples import IGNORED

NOT_THE_TEACHERS = ("labels", "shift_labels", "num_items_in_batch", "use_cache")
TABLES = 4
"""Of logits' size that are alive at a time, for each of the two that fused_loss.LOGITS_AT_ONCE allows for."""


@dataclass(frozen=True)
class Mixture:
    """What the loss of a token is made of."""

    weight: float
    """Of the teacher; the rest is cross-entropy."""
    temperature: float
    softcap: float | None = None
    """Logits x of the model become softcap * tanh(x / softcap)."""
    teacher_softcap: float | None = None


def distilled_sum(logits: Tensor, teacher: Tensor, targets: Tensor, mixture: Mixture) -> Tensor:
    """The sum over supervised tokens of (1 - w) cross-entropy + w T^2 KL(teacher || model), both softened by T.

    Args:
        logits, teacher: float32 or wider [T, V].
        targets: int64 [T]; -100 counts nothing, for the teacher neither.
    """
    kept = targets != IGNORED
    if mixture.softcap is not None:
        logits = mixture.softcap * torch.tanh(logits / mixture.softcap)
    if mixture.teacher_softcap is not None:
        teacher = mixture.teacher_softcap * torch.tanh(teacher / mixture.teacher_softcap)
    heat, share = mixture.temperature, mixture.weight
    ours, theirs = F.log_softmax(logits / heat, -1), F.log_softmax(teacher / heat, -1)
    by_token = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)  # [T]
    total = share * heat**2 * by_token[kept].sum()
    if share < 1:
        total = total + (1 - share) * F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return total


class _LinearDistillation(torch.autograd.Function):
    """distilled_sum(hidden @ weight.T, teacher_hidden @ teacher_weight.T, ...), and its gradients taken at once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        mixture: Mixture,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wanted = ctx.needs_input_grad[:2]
        to_hidden = torch.empty_like(hidden) if wanted[0] else None
        to_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        total = hidden.new_zeros((), dtype=wide)
        rows = max(1, logits_at_once(weight.device.type) // len(weight) // TABLES)
        parts = (tensor.split(rows) for tensor in (hidden, targets, teacher_hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            for place, (x, y, seen) in enumerate(zip(*parts, strict=True)):
                x, w = x.detach().requires_grad_(wanted[0]), weight.detach().requires_grad_(wanted[1])
                with torch.set_grad_enabled(any(wanted)):
                    theirs = (seen @ teacher_weight.t()).to(wide)  # [tokens of the chunk, V]
                    part = distilled_sum((x @ w.t()).to(wide), theirs, y, mixture)
                total += part.detach()
                if not any(wanted):
                    continue
                grads = iter(torch.autograd.grad(part, [t for t in (x, w) if t.requires_grad]))
                if to_hidden is not None:
                    to_hidden[place * rows : place * rows + len(x)] = next(grads)
                if to_weight is not None:
                    to_weight += next(grads)
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        to_hidden, to_weight = ctx.saved_tensors
        return (
            None if to_hidden is None else to_hidden * grad.to(to_hidden.dtype),
            None if to_weight is None else to_weight.mul_(grad).to(ctx.dtype),
            *(None,) * 4,
        )


class DistilledLoss(FusedLoss):
    """While installed, a forward pass with `labels` in training mode has the loss that `distilled_sum` describes, and
    gives no logits; in evaluation mode it has its own loss, so that held-out losses compare."""

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel, *, weight: float, temperature: float):
        """`teacher` is frozen and put into evaluation mode, and follows the model to its device.

        Raises UserError where a model does more with its logits than is known, and for different vocabularies."""
        if reason := unfit(teacher):
            raise UserError(f"distillation.teacher: {reason}")
        super().__init__(model)
        self._teacher = teacher.eval().requires_grad_(False)
        self._teacher_head = cast(nn.Linear, teacher.get_output_embeddings())
        ours, theirs = len(self._head.weight), len(self._teacher_head.weight)
        if ours != theirs:
            self.close()
            raise UserError(f"distillation.teacher: has {theirs} logits and the model {ours}; choose one of its family")
        config: Any = teacher.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        self._mixture = Mixture(weight, temperature, self._softcap, softcap)

    def _sum(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if not self._model.training:
            return super()._sum(hidden, weight, targets)
        assert self._given is not None
        if self._teacher.device != hidden.device:
            self._teacher.to(hidden.device)  # type: ignore[arg-type]
        with torch.no_grad():
            inputs = {key: value for key, value in self._given.items() if key not in NOT_THE_TEACHERS}
            seen = self._teacher.get_decoder()(**inputs, use_cache=False).last_hidden_state.flatten(0, -2)  # [T, d']
        head = self._teacher_head.weight
        if torch.is_autocast_enabled(hidden.device.type):
            head = head.to(hidden.dtype)
        total: Tensor = _LinearDistillation.apply(hidden, weight, targets, seen.to(head.dtype), head, self._mixture)
        return total
