"""How a model is pruned: the settings of every way of doing it, checked when made. Imports nothing heavy."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from graftlm.arguments import Count
from graftlm.errors import UserError

MethodName = Literal[
    "adapt", "llm-pruner", "flap", "slicegpt", "shortgpt", "minitron", "sheared", "magnitude", "random", "wina"
]
METHODS: tuple[str, ...] = get_args(MethodName)
Rule = Literal["cumulative", "literal"]
Similarity = Literal["cosine", "euclidean", "manhattan"]
HeadsBy = Literal["method", "loss"]
DEFAULTS: dict[str, Any] = {"samples": 10, "amplitude": 0.02, "heads_by": "method"}
"""Of what a preset may set."""
PRESETS: dict[str, dict[str, Any]] = {
    "authors-code": {"samples": 512},
    "at-once": {"samples": 64, "amplitude": 1.0, "iterations": 1, "heads_by": "loss"},
}
"""authors-code: calibration as the paper says. at-once: Adapt-Pruner in one step (A T as in its 50) on more text, with
key-value groups ranked by the loss without each; on SmolLM2 the best way to prune a model that is trained no further
(experiments/adapt_table1)."""


@dataclass(frozen=True)
class PruneSettings:
    """Settings of the verb prune: what goes, and how it is chosen (Adapt-Pruner, sections 3.1 and 3.2).

    Raises UserError for a value out of range.
    """

    method: MethodName = "adapt"
    """How: adapt (Adapt-Pruner), a method it is compared with, or a control (magnitude, random, wina)."""
    sparsity: float | None = None
    """Share of the parameters of heads and channels that goes, 0 to 1; give this or target_parameters."""
    target_parameters: Count | None = None
    """Parameters of the model that comes out, at most, e.g. 100M; as close below as one component allows."""
    exact: bool = True
    """The layers' sparsities are shifted alike until their sum meets the target. False: as published, every layer keeps
    int(n (1 - s)) of its components, whatever the sum; s is a share of the hidden size in slicegpt, of the layers in
    shortgpt, and flap does not count its biases (needs sparsity)."""
    uniform: bool | None = None
    """Every layer keeps the same number of components, or all it has where that is less; None: as the method does."""
    least_parameters: tuple[int, ...] = ()
    """Parameters that heads, and that channels keep at least, as far as the size allows: what a later pruning is to
    leave of each (a shrink sees to that itself). Methods that remove components of both heed it,
    but for flap, which ranks both together."""
    iterations: int | None = None
    """Steps T in which it is done, importance measured anew in each; None: as the method does (adapt: 50)."""
    amplitude: float | None = None
    """A: how far a layer's importance moves its sparsity, at each iteration (eq. 6); None: the preset's, or 0.02."""
    rule: Rule = "cumulative"
    """Sparsity of a layer: cumulative adds S/T - A I at every iteration (the authors' code); literal is S - A I."""
    similarity: Similarity = "cosine"
    """Of a layer's input and output: the more alike, the less the layer matters."""
    heads_by: HeadsBy | None = None
    """Which key-value groups of a layer go: method ranks them like channels; loss measures the loss without each, in a
    forward pass a group and iteration (on as many of the sequences as one pass takes: 640 tokens, at least one). None:
    the preset's, or method."""
    samples: int | None = None
    """Calibration sequences an iteration, drawn anew each time; None: the preset's, 10 without (512 in the paper)."""
    sample_length: int = 64
    """Tokens a calibration sequence."""
    width_multiple: int = 1
    """Channels of every FFN are a multiple of this (GGUF's Q8_0 needs 32, its K-quants 256)."""
    min_channels: int = 1
    """Channels that a layer's FFN keeps at least (rounded up to width_multiple); 0: a layer may lose its FFN."""
    min_groups: int = 1
    """Key-value groups that a layer keeps at least; 0: a layer may lose its attention."""
    preset: str | None = None
    """Named settings, which the others given here override: authors-code (512 samples), at-once (one step, 64 samples,
    amplitude 1, heads_by loss)."""
    seed: int = 0
    """Of the calibration sequences, of the random method, and of the gates and dropout of sheared."""
    flap_compensation: bool = True
    """flap: what the removed components gave on average becomes a bias of the output projections (no stock class)."""
    sheared_steps: int = 100
    """sheared: training steps of the masks, each on the sequences of a calibration iteration (3200 in the paper)."""
    sheared_gate_rate: float | None = None
    """sheared: learning rate of the gates; None: 50 / sheared_steps, 1.0 at most (1.0 in the paper)."""
    sheared_multiplier_rate: float = 1.0
    """sheared: learning rate of the Lagrange multipliers."""
    sheared_weight_rate: float = 1e-4
    """sheared: peak learning rate of the weights that are trained along; 0: only the gates are trained."""

    def __post_init__(self) -> None:
        self._check_names()
        not_given = {field.name: field.default for field in fields(self)}
        for name, value in {**DEFAULTS, **PRESETS.get(self.preset or "", {})}.items():
            if getattr(self, name) == not_given[name]:
                object.__setattr__(self, name, value)
        if (self.sparsity is None) == (self.target_parameters is None):
            raise UserError("sparsity: give it (such as 0.2) or target_parameters (such as 100M), one of the two")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise UserError(f"sparsity: {self.sparsity} must be between 0 and 1, e.g. 0.2")
        if self.least_parameters and (len(self.least_parameters) != 2 or min(self.least_parameters) < 0):
            raise UserError(
                f"least_parameters: {list(self.least_parameters)} must be two numbers: of heads, of channels"
            )
        if not self.exact and self.sparsity is None:
            raise UserError("exact: false meets no target_parameters; give sparsity")
        if self.amplitude is not None and not 0 <= self.amplitude < math.inf:
            raise UserError(
                f"amplitude: {self.amplitude} must be 0 (no difference between layers) or a number above it"
            )
        lowest = {"target_parameters": 1, "iterations": 1, "samples": 1, "sample_length": 2, "width_multiple": 1}
        for name, least in {**lowest, "min_groups": 0, "min_channels": 0, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}: {value} must be at least {least}")
        for name in ("sheared_steps", "sheared_gate_rate", "sheared_multiplier_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}: {value} must be above 0")
        if not self.sheared_weight_rate >= 0:
            raise UserError(f"sheared_weight_rate: {self.sheared_weight_rate} must not be negative")

    def _check_names(self) -> None:
        choices = {
            "method": METHODS,
            "rule": get_args(Rule),
            "similarity": get_args(Similarity),
            "heads_by": get_args(HeadsBy),
            "preset": PRESETS,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known and not (name in ("preset", "heads_by") and value is None):
                raise UserError(f"{name}: {value!r} is not known; there are {', '.join(known)}")
