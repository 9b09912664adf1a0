"""Gates between 0 and 1 that training can close for good: the hard concrete distribution (Louizos et al. 2018, arXiv
1712.01312), and the constraint that says how many close (Sheared-LLaMA, Xia et al. 2024, arXiv 2310.06694, 2.1)."""

import math

import torch
from torch import Tensor, nn

LOW, HIGH = -0.1, 1.1
"""The concrete variable is stretched to this range before it is cut at 0 and 1."""
TEMPERATURE = 2 / 3
LARGEST = math.log(100)
"""Bound on log alpha; beyond it a gate would hardly have gradients."""
OPEN = 5.0
"""Log alpha to begin with, as in the authors' code: gates are open."""


def sampled(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Gates in [0, 1], differentiable in `log_alpha`; `noise` is uniform in (0, 1), of the same shape."""
    concrete = torch.sigmoid((torch.logit(noise, eps=1e-6) + log_alpha) / TEMPERATURE)
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Probability that a sampled gate is not 0: the expected L0 norm."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


def settled(log_alpha: Tensor) -> Tensor:
    """What a gate that stays is taken to be when training ends (the authors' code: their 0.8 sharpens)."""
    return torch.sigmoid(log_alpha * 0.8 / TEMPERATURE)


class Constraint(nn.Module):
    """lambda_1 (s - t) + lambda_2 (s - t)^2 with the expected sparsity s of a layer and its target t, averaged over
    layers (section 2.1). The multipliers are to be increased: gradient ascent."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.zeros(()))
        self.quadratic = nn.Parameter(torch.zeros(()))

    def forward(self, expected: Tensor, target: Tensor) -> Tensor:
        """Expected and wanted sparsities, float [layers] each -> scalar."""
        gap = expected - target
        penalty: Tensor = (self.linear * gap + self.quadratic * gap.square()).mean()
        return penalty
