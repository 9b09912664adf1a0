"""Settings of the methods that train a part of the model's own weights, and of reweighting."""

from dataclasses import dataclass
from typing import Literal

from graftlm.errors import UserError


def _check_share(key: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"{key}: {value} must be above 0 and at most 1")


@dataclass(frozen=True)
class MaskSettings:
    """Gradient masks (methods gmt and rmt)."""

    share: float = 0.6
    """Share of the entries that a step changes (the APEX paper: 60%)."""
    scope: Literal["matrix", "model"] = "matrix"
    """That share of every tensor, or of all tensors together."""
    hold: bool = True
    """Entries that are masked stay exactly as they are. False: only their gradient is zero, and the optimizer's
    momentum and weight decay still move them."""

    def __post_init__(self) -> None:
        _check_share("gradient_mask.share", self.share)


@dataclass(frozen=True)
class S2ftSettings:
    """S2FT: whole heads and channels train (method s2ft)."""

    budget: float = 0.024
    """Trainable share of all parameters, at most; the same number of heads, and of channels, in every layer. Not used
    where both `heads` and `channels` are given."""
    heads: int | None = None
    """Heads of each layer that train (with `trains: coupled`, key-value groups); None: as many as `budget` gives, or
    leaves beside `channels`."""
    channels: int | None = None
    """Channels of each layer that train; None: as many as `budget` gives, or leaves beside `heads`."""
    trains: Literal["output", "coupled"] = "output"
    """output: the columns of output and down projections that belong to the chosen heads and channels. coupled: the
    rows of value, up and gate projections too (heads: whole key-value groups)."""
    choose_by: Literal["random", "weight", "activation", "gradient"] = "random"
    """How heads and channels are chosen: at random, or by the norm of their weights, their mean activation, or the norm
    of their gradient."""
    highest: bool = True
    """Take the highest by that measure. False: the lowest."""
    samples: int = 256
    """Training sequences that activation and gradient are measured on."""

    def __post_init__(self) -> None:
        _check_share("s2ft.budget", self.budget)
        for name in ("heads", "channels"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"s2ft.{name}: {value} must not be negative; null takes as many as the budget gives")
        if self.heads == 0 and self.channels == 0:
            raise UserError("s2ft.heads: no heads and no channels is nothing to train; give one of them a number")
        if self.samples < 1:
            raise UserError(f"s2ft.samples: {self.samples} must be at least 1")


@dataclass(frozen=True)
class HftSettings:
    """Half fine-tuning: half of the matrices train (method hft)."""

    round_steps: int | None = None
    """Optimizer steps after which another half is drawn. None: an epoch (with max_steps: one half for the whole
    run)."""

    def __post_init__(self) -> None:
        if self.round_steps is not None and self.round_steps < 1:
            raise UserError(f"hft.round_steps: {self.round_steps} must be at least 1, or null for an epoch")


@dataclass(frozen=True)
class LiftSettings:
    """LIFT: the principal entries of every matrix train (method lift)."""

    share: float = 0.05
    """Share of each matrix's entries that train (the paper: 5%)."""
    budget: float | None = None
    """Share of all parameters that train; `share` then follows from it."""
    rank: int = 64
    """Rank of the approximation whose largest entries train (the authors' runs: 16 to 128)."""
    interval: int = 400
    """Optimizer steps between choices (the authors' runs: mostly 400, or 2,000); 0: only one, before training."""
    svd_iterations: int | None = None
    """Subspace iterations of a fast, randomised SVD; None: the exact SVD."""

    def __post_init__(self) -> None:
        _check_share("lift.share", self.share)
        if self.budget is not None:
            _check_share("lift.budget", self.budget)
        if self.rank < 1:
            raise UserError(f"lift.rank: {self.rank} must be at least 1")
        if self.interval < 0:
            raise UserError(f"lift.interval: {self.interval} must not be negative; 0 chooses once")
        if self.svd_iterations is not None and self.svd_iterations < 1:
            raise UserError(f"lift.svd_iterations: {self.svd_iterations} must be at least 1, or null for the exact SVD")


@dataclass(frozen=True)
class IstSettings:
    """IST: a few layers' adapters train at a time, the more important ones more often (method ist; `lora:` sets the
    adapters)."""

    active: float = 0.25
    """Share of the layers that train in a step (the authors' code: 25%)."""
    interval: int = 10
    """Optimizer steps between estimates of the layers' importance (10)."""
    trials: int = 3
    """Sets of layers that an estimate suppresses, one after the other (3)."""
    suppressed: float = 0.5
    """Share of the layers in such a set (50%)."""
    suppression: float = 0.25
    """Factor on the adapters of suppressed layers (0.25)."""
    rate: float = 10.0
    """Learning rate of the importance (10)."""
    samples: int = 16
    """Training sequences of a trial (16)."""

    def __post_init__(self) -> None:
        for name in ("active", "suppressed"):
            _check_share(f"ist.{name}", getattr(self, name))
        for name in ("interval", "trials", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"ist.{name}: {getattr(self, name)} must be at least 1")
        if not 0 <= self.suppression < 1:
            raise UserError(f"ist.suppression: {self.suppression} must be in [0, 1)")
        if self.rate <= 0:
            raise UserError(f"ist.rate: {self.rate} must be above 0")


@dataclass(frozen=True)
class ReweightingSettings:
    """Loss-based weights of samples, with any method (arXiv 2502.06733). A control trains without."""

    strategy: Literal["none", "linupper", "quadratic", "extremes"] = "none"
    """none: every token counts alike. linupper: samples of low loss count less. quadratic: samples of low and of high
    loss count less. extremes: these count more."""
    r: float = 1.0
    """How flat the weights are: exp(score / r), divided by their sum (the authors' code: 1); near 0, only samples of
    the highest score count."""
    warmup_ratio: float = 0.05
    """Share of the run's steps before weights begin (the authors' code: 5%); until then samples count alike."""

    def __post_init__(self) -> None:
        if self.r <= 0:
            raise UserError(f"reweighting.r: {self.r} must be above 0; a large one weighs all samples alike")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"reweighting.warmup_ratio: {self.warmup_ratio} must be in [0, 1)")
