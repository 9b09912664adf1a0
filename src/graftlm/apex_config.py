"""What a user may set of APEX, and the named presets."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from graftlm.errors import UserError


@dataclass(frozen=True)
class ApexConfig:
    """Settings of APEX (apex:). The paper is arXiv 2505.24241; section and equation numbers are its."""

    k_heads: float = 0.125
    """Share of the attention heads in P, and in N (K of eq. 4). Rounded on key-value groups, at least one; the
    effective share is printed."""
    k_channels: float = 0.125
    """Share of the FFN channels in P, and in N (K of eq. 5-6)."""
    assessment: Literal["rank", "average", "random", "magnitude", "gradient"] = "rank"
    """How components are scored (table 6): counts of Top-K minus Min-K (section 3.1), mean activation, or at random
    (the ablation without assessment). Besides: by the squared norm of their weights in the mixed matrices, or of the
    gradients there, summed over optimizer steps (the first stage: over the sequences seen before training; needs
    trains: full); each matrix relative to its mean."""
    assess_per: Literal["sample", "microbatch"] = "sample"
    """What is ranked as one sample. `microbatch` is what the authors' code does: a whole micro-batch flattened, padding
    included."""
    assess_samples: int = 256
    """Sequences run forward before training to score the first stage. The paper: 30 M tokens or data samples (its text
    says both)."""
    assess_interval: int = 1
    """Assess only every n-th optimizer step of a stage, its first among them."""
    fused_gate: bool = True
    """Compute the FFN's gated product and its channels' statistic in one pass, which keeps a third less for the
    backward pass (and on a CPU takes 1% of a step more than the product alone); where it cannot be, a note says so."""
    expand: bool = True
    """False trains the same components without operators (the ablation of table 3)."""
    modules: tuple[Literal["v", "o", "up", "gate", "down"], ...] = ("v", "o", "up", "gate", "down")
    """Matrices whose weak rows or columns are expanded into; the others train without operators. The paper: all."""
    operator: Literal["monarch", "dense", "diagonal"] = "monarch"
    """The form of M: Monarch (eq. 13 with dense R), dense (eq. 12), or eq. 13 read literally (every block diagonal)."""
    share_operators: bool = True
    """One operator for {v, o} and one for {up, gate, down} of a layer; False gives each matrix its own."""
    authors_diagonals: bool = False
    """Two trainable diagonals beside M, ones at the start: on N in every mixed matrix, on P in v, up and gate. From the
    authors' code, not the paper."""
    operator_learning_rate: float | Literal["auto"] = 1.0
    """Multiplier on the learning rate for operators. `auto`: per operator, such that M W[P] moves a row as far as its
    own update does."""
    operator_scale: float = 1.0
    """Factor on the operators' D at the start of a stage: how far M moves for a step of R."""
    keep_operator_moments: bool = False
    """Keep the operators' optimizer moments when a stage begins, although P, N and the operators are new."""
    start: Literal["zero", "split"] = "zero"
    """How a stage begins. zero: operators of 0, no bit of the output changes. split: besides, N becomes a copy of P
    and P's output is divided between the two (Net2Net), so that what N contributed before is lost (trains: full)."""
    split_tolerance: float = 0.02
    """Layers are split, those first whose N is least active, as long as the loss rises by no more nats than this, for
    heads and channels apart."""
    stages: int = 3
    """T: how often P and N are chosen. Each stage ends with fusion."""
    stage_by: Literal["steps", "epochs", "tokens"] = "steps"
    """What a stage's length is counted in."""
    stage_length: float | None = None
    """Length of a stage in that unit; None divides the run evenly (tokens: needs a length, since the total is not known
    beforehand)."""
    stage_learning_rates: tuple[float, ...] | None = None
    """One peak learning rate per stage in place of learning_rate (section 4.2: 1e-4, 4e-5, 1e-5 ...)."""
    rewarmup_ratio: float = 0.0
    """Share of the run's steps over which the learning rate climbs again from 0 at each stage boundary (the authors'
    code: 0.005)."""
    trains: Literal["full", "half", "small"] = "full"
    """full: everything. half: N and P, then the next lowest components, their q/k rows, embeddings and LM head. small:
    operators and slices of N and P."""
    budget: float | None = None
    """Trainable share of all parameters for half (None: 0.52) and small (None: 0.024), operators included."""
    activation_regularization: float = 0.0
    """Weight of a penalty on sigma / mean of each module's activations (table 7, where it fails). It is part of
    the training loss that is logged, and of no held-out loss."""
    seed: int | None = None
    """Seed of the operators' D and of random scores; None: the run's seed (0 outside a run)."""

    def __post_init__(self) -> None:
        for name in ("k_heads", "k_channels"):
            value = getattr(self, name)
            if not 0 < value <= 0.5:
                raise UserError(
                    f"apex.{name}: {value} must be above 0 and at most 0.5, or P and N overlap; choose e.g. 0.125"
                )
        if not self.modules or len(set(self.modules)) < len(self.modules):
            raise UserError(
                f"apex.modules: {list(self.modules)} must name matrices, each once; expand: false trains without "
                "operators"
            )
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"apex.{one.name}: {value} must be a finite number")
        if self.stages < 1:
            raise UserError(f"apex.stages: {self.stages} must be at least 1")
        if self.assess_samples < 1:
            raise UserError(f"apex.assess_samples: {self.assess_samples} must be at least 1")
        if self.assess_interval < 1:
            raise UserError(f"apex.assess_interval: {self.assess_interval} must be at least 1")
        if self.stage_length is not None and self.stage_length <= 0:
            raise UserError(f"apex.stage_length: {self.stage_length} must be above 0")
        if self.stage_by == "tokens" and self.stage_length is None:
            raise UserError("apex.stage_length: stages by tokens need a length, e.g. stage_length: 1_000_000")
        if self.stage_learning_rates is not None and len(self.stage_learning_rates) != self.stages:
            raise UserError(
                f"apex.stage_learning_rates: {len(self.stage_learning_rates)} rates for {self.stages} stages; one each"
            )
        if self.stage_learning_rates is not None and min(self.stage_learning_rates) <= 0:
            raise UserError("apex.stage_learning_rates: every rate must be above 0")
        if not 0 <= self.rewarmup_ratio < 1:
            raise UserError(f"apex.rewarmup_ratio: {self.rewarmup_ratio} must be in [0, 1)")
        if self.operator_learning_rate != "auto" and self.operator_learning_rate <= 0:
            raise UserError(f"apex.operator_learning_rate: {self.operator_learning_rate} must be above 0, or auto")
        if self.operator_scale <= 0:
            raise UserError(f"apex.operator_scale: {self.operator_scale} must be above 0")
        if self.start == "split" and self.trains != "full":
            raise UserError(f"apex.start: split changes whole components; it needs trains: full, not {self.trains}")
        if self.start == "split" and self.assessment not in ("rank", "average"):
            raise UserError("apex.start: split is measured on what the assessment sees; choose assessment: rank")
        if self.assessment == "gradient" and self.trains != "full":
            raise UserError(
                f"apex.assessment: gradient needs those of whole matrices; set trains: full, not {self.trains}"
            )
        if self.budget is not None and not 0 < self.budget <= 1:
            raise UserError(f"apex.budget: {self.budget} must be in (0, 1]")
        if self.budget is not None and self.trains == "full":
            raise UserError("apex.budget: goes with trains: half or small; full trains everything")
        if self.activation_regularization < 0:
            raise UserError(f"apex.activation_regularization: {self.activation_regularization} must not be negative")

    @property
    def trainable_budget(self) -> float:
        """Trainable share that the regime aims at (section 4.1: half 52%, small 2.4%)."""
        return self.budget if self.budget is not None else {"full": 1.0, "half": 0.52, "small": 0.024}[self.trains]


# Each preset lists only where it differs from the defaults above.
PRESETS: dict[str, dict[str, Any]] = {
    # Section 4.1 and appendix A.2: K 18.75%, as many stages as epochs, half of the parameters.
    "paper-it": {"k_heads": 0.1875, "k_channels": 0.1875, "stages": 2, "stage_by": "epochs", "trains": "half"},
    # Section 4.2: K 12.5%, three stages, a learning rate per stage (appendix A.3 lists five; the first three are used).
    "paper-cpt": {"stages": 3, "stage_learning_rates": (1e-4, 4e-5, 1e-5)},
    # The published code: ranks per micro-batch, diagonals beside M, 12,288 samples before training, one cosine with
    # a re-warmup of 0.5% at each stage.
    "authors-code": {
        "k_heads": 0.1875,
        "k_channels": 0.1875,
        "assess_per": "microbatch",
        "assess_samples": 12288,
        "authors_diagonals": True,
        "rewarmup_ratio": 0.005,
        "stage_by": "epochs",
        "stages": 2,
        "trains": "half",
    },
}


def apply_preset(name: str, settings: dict[str, Any] | None = None) -> ApexConfig:
    """The preset `name` with `settings` laid over it. Raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"apex.preset: {name!r} is not one of {', '.join(PRESETS)}")
    return replace(ApexConfig(), **{**PRESETS[name], **(settings or {})})
