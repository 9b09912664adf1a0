"""From finished cells to what a comparison of ways of pruning shows: comparison.json."""

import datetime
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.comparing.pruning.cells import PruneCells
from graftlm.comparing.pruning.config import PruneArm, PruneComparison, Size
from graftlm.comparing.results import Record
from graftlm.comparing.statistics import are_copies
from graftlm.comparing.summary import (
    commits,
    different,
    hardware_text,
    mean_by_seed,
    paired_differences,
    task_scores,
    tasks_average,
    versions,
)
from graftlm.reporting import figures

FORMAT = 1
SAME_SIZE = 0.005
"""Of the original's parameters, by which a model may be below its target without a note."""
MOST = sys.float_info.max
"""In the place of a ratio that is more: JSON has no infinity."""
AVERAGED = ("parameters", "target_parameters", "seconds", "peak_memory_bytes", "tokens")


def summarise(comparison: PruneComparison, cells: PruneCells, failed: Mapping[str, str]) -> dict[str, Any]:
    """Everything that can be said so far: the original, and a row for every size and variant."""
    notes = list(comparison.notes)
    records: list[Record] = []
    original = cells.record(cells.original())
    rows = []
    for size in comparison.sizes:
        runs = {arm.name: _runs(arm, size, cells) for arm in comparison.arms}
        rows += [_row(arm, size, comparison, runs, notes) for arm in comparison.arms]
        records += [record for by_seed in runs.values() for record in by_seed.values()]
    notes += list(dict.fromkeys(note for record in records for note in record.get("notes", ())))
    if len(rows) > 3:
        notes.append("each interval is for its own comparison: of 20 variants without any effect, one shows one")
    settings = comparison.settings
    everything = [*([original] if original else []), *records]
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": settings.model,
        "seeds": list(settings.seeds),
        "control": comparison.control,
        "texts": [Path(text).name for text in settings.perplexity],
        "measured": _measured(everything),
        "original": _original(original),
        "original_parameters": records[0]["original_parameters"] if records else None,
        "original_shapes": records[0]["original_shapes"] if records else None,
        "rows": rows,
        "notes": list(dict.fromkeys(notes)),
        "failed": list(failed.values()),
        "open": len(cells.open()),
        "hardware": different([hardware_text(record) for record in everything]),
        "commits": commits(everything),
        "versions": versions(everything),
    }


def _runs(arm: PruneArm, size: Size, cells: PruneCells) -> dict[int, Record]:
    found = {seed: cells.record(cells.cell(arm.name, size, seed)) for seed in cells.comparison.settings.seeds}
    return {seed: record for seed, record in found.items() if record is not None}


def _row(
    arm: PruneArm, size: Size, comparison: PruneComparison, runs: Mapping[str, Mapping[int, Record]], notes: list[str]
) -> dict[str, Any]:
    own, other = runs[arm.name], {} if arm.name == comparison.control else runs[comparison.control]
    perplexity = {}
    texts = [Path(text).name for text in comparison.settings.perplexity]
    # Of both sides one model in all trials, as far as every text tells.
    copies = all(
        are_copies([record["perplexity"][text]["word_perplexity"] for record in some.values()])
        for some in (own, other)
        for text in texts
    )
    if copies and other:
        notes.append(
            f"{arm.name} at {size.label} is one model in all trials, and so is {comparison.control}: no interval"
        )
    for text in texts:
        mine, theirs = (
            {seed: word for seed, r in some.items() if (word := r["perplexity"][text]["word_perplexity"]) is not None}
            for some in (own, other)
        )
        tokens = {seed: record["perplexity"][text]["token_perplexity"] for seed, record in own.items()}
        ratio = paired_ratios(mine, theirs, copies=copies)
        perplexity[text] = {
            "word": geometric_mean(mine),
            "token": geometric_mean(tokens),
            "ratio": ratio,
            "lower_in": sum(one < 1 for one in ratio["by_seed"].values()) if ratio else None,
        }
        if len(mine) < len(own):
            notes.append(f"{arm.name} at {size.label}: word perplexity on {text} is beyond a double in some trials")
    for record in own.values():
        notes += _off_target(f"{arm.name} at {size.label}", record)
    shapes = next(iter(own.values()), {}).get("shapes")
    looked_at = dict(arm.by_size)[size].calibration_tokens  # by its settings, so that older cells have it too
    return {
        "name": arm.name,
        "size": size.label,
        "sparsity": size.sparsity,
        "method": arm.method,
        "control": arm.name == comparison.control,
        "perplexity": perplexity,
        **{key: mean_by_seed({s: r[key] for s, r in own.items() if r.get(key) is not None}) for key in AVERAGED},
        "calibration_tokens": mean_by_seed(
            {s: seen for s, r in own.items() if (seen := r.get("calibration_tokens", looked_at)) is not None}
        ),
        "gone": mean_by_seed({seed: 1 - r["parameters"] / r["original_parameters"] for seed, r in own.items()}),
        "components_gone": _components_gone(own),
        "shapes": shapes,
        "tasks": task_scores(own, other, copies=copies),
        "tasks_average": tasks_average(own, other, copies=copies),
    }


def geometric_mean(by_seed: Mapping[int, float]) -> dict[str, Any] | None:
    """As mean_by_seed, of perplexities: they are powers of what is measured, and of broken models lie orders of
    magnitude apart. `lowest`, `highest`: of the trials."""
    if not by_seed or any(value is None for value in by_seed.values()):
        return None
    values = list(by_seed.values())
    mean = _exp(statistics.fmean(map(math.log, values)))
    told = {str(seed): value for seed, value in by_seed.items()}
    return {"mean": mean, "lowest": min(values), "highest": max(values), "by_seed": told}


def paired_ratios(
    own: Mapping[int, float], other: Mapping[int, float], *, copies: bool = False
) -> dict[str, Any] | None:
    """own / other over the seeds that both have, as summary.paired_differences: the mean is geometric, and its
    intervals are those of the difference of logarithms (of nats a word, where these are word perplexities), because
    perplexities of broken models lie orders of magnitude apart."""
    mine, theirs = ({seed: math.log(value) for seed, value in some.items()} for some in (own, other))
    logs = paired_differences(mine, theirs, copies=copies)
    if logs is None:
        return None

    def raised(ends: Sequence[float] | None) -> list[float] | None:
        return None if ends is None else [_exp(end) for end in ends]

    return {
        **logs,
        "mean": _exp(logs["mean"]),
        "t_interval": raised(logs["t_interval"]),
        "bootstrap_interval": raised(logs["bootstrap_interval"]),
        "by_seed": {seed: min(own[int(seed)] / other[int(seed)], MOST) for seed in logs["by_seed"]},
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < math.log(MOST) else MOST


def _off_target(title: str, record: Record) -> list[str]:
    """A note where a model is not of the size that was asked for, so that it is not compared as if it were."""
    target, count = record.get("target_parameters"), record["parameters"]
    if target is None or 0 <= target - count <= SAME_SIZE * record["original_parameters"]:
        return []
    by = abs(count - target) / record["original_parameters"]
    return [f"{title}: {by:.1%} of the original's parameters {'above' if count > target else 'below'} the target"]


def _components_gone(own: Mapping[int, Record]) -> dict[str, Any]:
    """Share of the key-value groups and of the channels that went, mean over trials."""
    gone = {}
    for kind, width in (("heads", "num_key_value_heads"), ("channels", "intermediate_size")):
        by_seed = {}
        for seed, record in own.items():
            before = sum(shape[width] for shape in record["original_shapes"])
            by_seed[seed] = 1 - sum(shape[width] for shape in record["shapes"]) / before
        gone[kind] = mean_by_seed(by_seed)
    return gone


def _original(record: Record | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {
        "perplexity": record["perplexity"],
        "tasks": task_scores({0: record}, {}),
        "tasks_average": tasks_average({0: record}, {}),
        "seconds": record["wall_seconds"],
    }


def _measured(records: list[Record]) -> str:
    """`wikitext.txt: 20,000 words, 26,000 tokens, context of 1,024 tokens`."""
    return "; ".join(
        f"{name}: {figures.integer(found['words'])} words, {figures.integer(found['tokens'])} tokens, context of "
        f"{figures.integer(found['max_length'])} tokens"
        for name, found in (records[0]["perplexity"].items() if records else ())
    )
