"""Numbers as people read them, and the rows that set a run beside its control. Table, report and card share these."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ONE_SEED = (
    "One run with one seed is not evidence of a difference: what another seed would change is unknown. "
    "Repeat with several seeds before drawing a conclusion."
)
MISSING = "–"


METHOD_NAMES = {
    "apex": "APEX", "full": "plain training", "lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA", "pissa": "PiSSA",
    "olora": "OLoRA", "eva": "EVA", "lora_ga": "LoRA-GA", "miss": "MiSS", "relora": "ReLoRA", "s2ft": "S²FT",
    "hft": "HFT", "gmt": "GMT", "rmt": "RMT", "lift": "LIFT", "ist": "IST",
}  # fmt: skip


PRUNING_NAMES = {
    "adapt": "Adapt-Pruner", "llm-pruner": "LLM-Pruner", "flap": "FLAP", "slicegpt": "SliceGPT", "shortgpt": "ShortGPT",
    "minitron": "Minitron", "sheared": "Sheared-LLaMA", "wina": "WINA", "magnitude": "magnitude",
    "random": "random choice",
}  # fmt: skip
"""What each way of pruning goes by in titles and legends."""


def method_name(method: str | None) -> str:
    """The name a method goes by in titles and legends."""
    return METHOD_NAMES.get(method or "", method or "run")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _optional(show: Callable[[float], str]) -> Callable[[Any], str]:
    """A formatter that shows a dash for what is not there or not finite."""
    return lambda value: show(value) if is_number(value) else MISSING


def _count(value: float, digits: int = 3) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # where three digits round up to the next suffix
            return f"{value / size:.{digits}g} {suffix}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _size(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 700 else "inf"  # exp overflows a double above 709


count = _optional(_count)
close_count = _optional(lambda value: _count(value, 4))
duration = _optional(_duration)
size = _optional(_size)
integer = _optional(lambda value: f"{round(value):,}")
loss = _optional(lambda value: f"{value:.4f}")
rate = _optional(lambda value: f"{value:,.0f}")
number = _optional(lambda value: f"{value:.3g}")
share = _optional(lambda value: f"{value:.1%}")
small_share = _optional(lambda value: f"{value:.2%}")
scientific = _optional(lambda value: f"{value:.1e}" if value else "exactly 0")
perplexity = _optional(_perplexity)


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a label, the run's figure, the control's, and how the run compares."""

    label: str
    run: str
    control: str
    compared: str
    cost: bool = False
    """Whether it says what the run cost rather than what came out of it."""


def difference(a: Any, b: Any) -> str:
    """`a - b`, signed, in the unit of both."""
    return signed(a - b, 4) if is_number(a) and is_number(b) else ""


def signed(value: float, digits: int) -> str:
    """A difference with its sign, and without one where all digits shown are 0."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def ratio(a: Any, b: Any) -> str:
    """How many times `b` `a` is."""
    return f"{a / b:.3f} ×" if is_number(a) and is_number(b) and b else ""


def comparison(summary: dict[str, Any], control: dict[str, Any] | None) -> list[Row]:
    """The figures of a run beside its control's, in the order people ask for them. Rows with no figure are left out."""
    other = control or {}

    def nothing(a: Any, b: Any) -> str:
        return ""

    def row(
        label: str,
        key: str,
        show: Callable[[Any], str],
        compare: Callable[[Any, Any], str] = nothing,
        cost: bool = False,
    ) -> Row:
        a, b = summary.get(key), other.get(key)
        return Row(label, show(a), show(b), compare(a, b), cost)

    rows = [
        row("tokens trained on", "tokens", count),
        row("optimizer steps", "steps", integer),
        row("evaluation loss, start", "eval_loss_start", loss),
        row("evaluation loss, end", "eval_loss_end", loss, difference),
        row("perplexity, start", "eval_loss_start", perplexity),
        row("perplexity, end", "eval_loss_end", perplexity, ratio_of_perplexities),
        row("time", "seconds", duration, ratio, cost=True),
        row("tokens per second", "tokens_per_second", rate, ratio, cost=True),
        row("peak memory", "peak_memory_bytes", size, ratio, cost=True),
        row("trainable parameters", "trainable_parameters", count),
        row("trainable, of the model's own parameters", "trainable_fraction", small_share),
        row("of these, operators", "operator_parameters", count),
    ]
    return [r for r in rows if {r.run, r.control} - {MISSING, "0"}]


def ratio_of_perplexities(a: Any, b: Any) -> str:
    """exp(a) / exp(b) of two losses."""
    return f"{math.exp(min(a - b, 700)):.4f} ×" if is_number(a) and is_number(b) else ""


def verdict(summary: dict[str, Any], control: dict[str, Any] | None) -> str:
    """One sentence on where the losses ended, which claims no more than what was measured."""
    name, end = method_name(summary.get("method")), summary.get("eval_loss_end")
    tokens = count(summary.get("tokens"))
    after = f"after {tokens} tokens" if tokens != MISSING else "so far"
    if not is_number(end):
        return (
            f"{name}: no evaluation yet" if not is_number(summary.get("tokens")) else f"{name}, {after}: not evaluated"
        )
    other = (control or {}).get("eval_loss_end")
    if is_number(other):
        return f"Evaluation loss {after}: {name} {loss(end)}, control {loss(other)}"
    start = summary.get("eval_loss_start")
    return f"Evaluation loss {after}: {name} " + (f"{loss(start)} → " if is_number(start) else "") + loss(end)
