"""What is known of every way of pruning before it runs: its module, its steps, what it takes and what it looks at."""

from dataclasses import dataclass

from graftlm.pruning.base import TOKENS_A_PASS
from graftlm.pruning.settings import MethodName, PruneSettings


@dataclass(frozen=True)
class Way:
    """One way of pruning."""

    module: str
    """Of pruning/methods."""
    iterations: int | None = None
    """Steps of the loop that scores and removes components (pruning.prune.iterate) where none are asked for; layers may
    then differ by importance. None: it is not of that loop."""
    components: bool = True
    """It takes components out of layers; else whole layers, or a part of the hidden size."""
    calibrated: bool = True
    """Its own measure looks at the calibration sequences."""


WAYS: dict[MethodName, Way] = {
    "adapt": Way("adapt", iterations=50),  # T of the paper's table 8
    "llm-pruner": Way("llm_pruner", iterations=1),
    "flap": Way("flap"),
    "slicegpt": Way("slicegpt", components=False),
    "shortgpt": Way("shortgpt", components=False),
    "minitron": Way("minitron", iterations=1),
    "sheared": Way("sheared"),
    "magnitude": Way("magnitude", iterations=1, calibrated=False),
    "random": Way("random", iterations=1, calibrated=False),
    "wina": Way("wina", iterations=1),
}


def iterations_of(settings: PruneSettings) -> int:
    """Steps in which components go."""
    return settings.iterations or WAYS[settings.method].iterations or 1


def layers_differ(settings: PruneSettings) -> bool:
    """Whether the importance of layers, which is measured on calibration sequences, says what each of them loses."""
    uniform = settings.method != "adapt" if settings.uniform is None else settings.uniform
    return WAYS[settings.method].iterations is not None and not uniform


def is_uniform(settings: PruneSettings) -> bool:
    """Whether every layer loses the same, as in the control that a choice of layers has to beat."""
    if settings.method == "shortgpt":
        return False
    return settings.method not in ("adapt", "flap") if settings.uniform is None else settings.uniform


def has_control(settings: PruneSettings) -> bool:
    """Whether the same method can prune every layer alike, to compare with."""
    return WAYS[settings.method].components and not is_uniform(settings)


def draws(settings: PruneSettings) -> int:
    """How many times calibration sequences are drawn to be looked at; 0: never."""
    if settings.method == "sheared":  # in every step of training its masks
        return settings.sheared_steps
    looks = WAYS[settings.method].calibrated or layers_differ(settings) or settings.heads_by == "loss"
    return iterations_of(settings) if looks else 0


def sequences_seen(settings: PruneSettings) -> int:
    """Calibration sequences that the method looks at, in all of its steps; one that is drawn again counts again."""
    assert settings.samples is not None  # of a default or a preset
    each = settings.samples
    if not WAYS[settings.method].calibrated and not layers_differ(settings):  # heads_by: loss, on one pass's
        each = min(each, max(1, TOKENS_A_PASS // settings.sample_length))
    return draws(settings) * each


def calibration_in_words(settings: PruneSettings) -> str:
    """What a time of pruning is for: `500 sequences of 64 tokens (10 in each of 50 steps)`."""
    seen, steps = sequences_seen(settings), draws(settings)
    if not seen:
        return "no calibration text"
    each = f" ({seen // steps} in each of {steps} steps)" if steps > 1 else ""
    return f"{seen:,} sequence{'' if seen == 1 else 's'} of {settings.sample_length} tokens{each}"
