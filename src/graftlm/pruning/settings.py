"""How a model is pruned: the settings of every way of doing it, checked when made. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

MethodName = Literal[
    "adapt", "llm-pruner", "flap", "slicegpt", "shortgpt", "minitron", "sheared", "magnitude", "random", "wina"
]
METHODS: tuple[str, ...] = get_args(MethodName)
Rule = Literal["cumulative", "literal"]
Similarity = Literal["cosine", "euclidean", "manhattan"]
PRESETS: dict[str, dict[str, Any]] = {"authors-code": {"samples": 512}}


@dataclass(frozen=True)
class PruneSettings:
    """What is removed, and how it is chosen (Adapt-Pruner, sections 3.1 and 3.2)."""

    method: MethodName = "adapt"
    """How: adapt (Adapt-Pruner), a method it is compared with, or a control (magnitude, random, wina)."""
    sparsity: float | None = None
    """Share of every kind of component that goes over all layers, 0 to 1; give this or target_parameters."""
    target_parameters: int | None = None
    """Parameters of the model that comes out, at most; as close below as one component allows."""
    uniform: bool | None = None
    """Every layer loses the same share; None: as the method does."""
    iterations: int | None = None
    """Steps T in which it is done, importance measured anew in each; None: as the method does (adapt: 50)."""
    amplitude: float = 0.02
    """A: how far a layer's importance moves its sparsity, at each iteration (eq. 6)."""
    rule: Rule = "cumulative"
    """Sparsity of a layer: cumulative adds S/T - A I at every iteration (the authors' code); literal is S - A I."""
    similarity: Similarity = "cosine"
    """Of a layer's input and output: the more alike, the less the layer matters."""
    samples: int = 10
    """Calibration sequences an iteration, drawn anew each time (512 in the paper: preset authors-code)."""
    sample_length: int = 64
    """Tokens a calibration sequence."""
    width_multiple: int = 1
    """Channels of every FFN are a multiple of this (GGUF's Q8_0 needs 32, its K-quants 256)."""
    min_groups: int = 1
    """Key-value groups that a layer keeps at least; 0: a layer may lose its attention."""
    preset: str | None = None
    """Named settings, which the others given here override: authors-code."""
    seed: int = 0
    """Of the calibration sequences, and of the random method."""
