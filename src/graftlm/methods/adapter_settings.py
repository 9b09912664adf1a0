"""Settings of the methods that train adapters: `lora:` for all of them, `relora:` for ReLoRA besides."""

from dataclasses import dataclass
from typing import Literal

from graftlm.errors import UserError


@dataclass(frozen=True)
class LoraSettings:
    """Adapters on linear layers, merged into the weights at the end (methods lora, dora, rslora, pissa, olora, eva,
    lora_ga, miss, relora, ist)."""

    rank: int = 64
    """Rank of each adapter (the APEX paper: 64, appendix A.2)."""
    budget: float | None = None
    """Share of all parameters that may train; the rank is then the largest that stays below it, and `rank` is not
    used."""
    alpha: float | None = None
    """Adapters are scaled by alpha / rank (rslora: alpha / sqrt(rank)). None: as the method's source has it
    (docs/methods.md)."""
    dropout: float = 0.0
    """Dropout of an adapter's input."""
    target: Literal["all", "attention", "ffn"] = "all"
    """Linear layers that get an adapter: all of the decoder layers (never embeddings and LM head), those of attention,
    or those of the FFN."""
    samples: int = 256
    """Training sequences that eva and lora_ga see before training."""
    svd_iterations: int | None = None
    """pissa: subspace iterations of a fast, randomised SVD; None: the exact SVD."""
    eva_rho: float = 2.0
    """eva: a layer's rank may be up to rho times `rank`, others' are lower by as much; 1: all ranks alike. Where the
    ranks would be more than `budget`, those that explain least are left out."""
    eva_tau: float = 0.99
    """eva: a layer has been seen enough when the cosine between successive singular vectors is so high; below 1."""
    lora_ga_direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    """lora_ga: which singular vectors of the gradient A and B get."""
    lora_ga_scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    """lora_ga: how they are scaled."""
    lora_ga_gamma: int = 16
    """lora_ga: gamma of the scale `stable`."""

    def __post_init__(self) -> None:
        for name in ("rank", "samples", "lora_ga_gamma"):
            if getattr(self, name) < 1:
                raise UserError(f"lora.{name}: {getattr(self, name)} must be at least 1")
        if self.budget is not None and not 0 < self.budget < 1:
            raise UserError(f"lora.budget: {self.budget} must be above 0 and below 1, e.g. 0.024")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"lora.alpha: {self.alpha} must be above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout: {self.dropout} must be in [0, 1)")
        if self.svd_iterations is not None and self.svd_iterations < 1:
            raise UserError(f"lora.svd_iterations: {self.svd_iterations} must be at least 1, or null for the exact SVD")
        if self.eva_rho < 1:
            raise UserError(f"lora.eva_rho: {self.eva_rho} must be at least 1, which gives every layer the same rank")
        if not 0 < self.eva_tau < 1:  # of two vectors that are the same, rounding may leave less than 1
            raise UserError(f"lora.eva_tau: {self.eva_tau} must be above 0 and below 1, e.g. 0.99")


@dataclass(frozen=True)
class ReloraSettings:
    """ReLoRA: LoRA that is merged and begun anew again and again (`lora:` sets the adapters)."""

    interval: float = 0.25
    """Optimizer steps between merges; below 1: a share of the run's steps. The paper: 5,000 of 20,000 steps. As long
    as the run: no merge, which is lora."""
    warmup: float = 0.01
    """Steps over which the learning rate climbs again after a merge; below 1: a share of the run's steps. At most
    `interval`. The paper: 50 to 100 steps."""
    prune: float = 0.99
    """Share of the adapters' optimizer state that a merge sets to zero; 1 forgets all of it, 0 keeps it."""
    prune_by: Literal["magnitude", "random"] = "magnitude"
    """Which entries: the smallest, or any."""
    warm_start: float = 0.0
    """Steps at the beginning that train all weights, before the first adapters; below 1: a share of the run's steps. At
    most all but one. The paper: 5,000 of 20,000 steps, since it trains from nothing; 0: none."""

    def __post_init__(self) -> None:
        if self.interval <= 0:
            raise UserError(f"relora.interval: {self.interval} must be above 0")
        for name in ("warmup", "warm_start"):
            if getattr(self, name) < 0:
                raise UserError(f"relora.{name}: {getattr(self, name)} must not be negative")
        if not 0 <= self.prune <= 1:
            raise UserError(f"relora.prune: {self.prune} must be in [0, 1]")
