"""From finished runs to what a comparison shows: comparison.json, which tables, plots and report are made from."""

import dataclasses
import datetime
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graftlm.comparing.cells import Cells
from graftlm.comparing.config import SAME_FOR_ALL, Arm, Comparison, one_order
from graftlm.comparing.results import Record
from graftlm.comparing.statistics import are_copies, difference, tokens_needed
from graftlm.errors import UserError
from graftlm.identity import same_settings
from graftlm.reporting import figures

FORMAT = 1
PREFERRED = ("acc_norm", "acc", "exact_match", "pass@1")
"""Which of a task's metrics tables show, the first there is; else the evaluation's main_metric."""
UNSTEADY = 1.25
"""Times of an arm's seeds that differ by more than this factor were not taken on a machine of their own."""
SAME_START = 1e-3
"""Nats by which arms may differ before the first step (rounding; adapters that take weights apart)."""


def summarise(comparison: Comparison, cells: Cells, failed: Mapping[str, str]) -> dict[str, Any]:
    """Everything that can be said so far. Raises UserError for runs of one seed that cannot be compared."""
    notes = list(comparison.notes)
    runs = {arm.name: _runs(arm, cells) for arm in comparison.arms}
    for arm in comparison.arms:
        _check_pairs(arm, runs, notes)
    curves = {arm.name: _plain_curve(arm, cells, notes) for arm in comparison.controls}
    arms = [_arm(arm, comparison, cells, runs, curves, notes) for arm in comparison.arms]
    if sum(arm.matched is not None for arm in comparison.arms) > 2:
        notes.append("each interval is for its own comparison: of 20 arms without any effect, one shows one on average")
    records = [record for by_seed in runs.values() for record in by_seed.values()]
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": comparison.arms[0].config.model,
        "seeds": list(comparison.settings.seeds),
        "arms": arms,
        "plain": {name: curve for name, curve in curves.items() if curve is not None},
        "notes": list(dict.fromkeys(notes)),
        "failed": list(failed.values()),
        "open": len(cells.open()),
        "hardware": different([hardware_text(record) for record in records]),
        "commits": commits(records),
        "versions": versions(records),
        "tasks": list(comparison.settings.tasks),
    }


def _runs(arm: Arm, cells: Cells) -> dict[int, Record]:
    """Finished runs of an arm at its chosen learning rate, by seed; without tasks those that were not evaluated on what
    is asked now."""
    rate = cells.chosen_rate(arm)
    if rate is None:
        return {}
    found: dict[int, Record] = {}
    for seed in cells.comparison.settings.seeds:
        cell = cells.cell(arm, seed, rate)
        record = cells.trained(cell)
        if record is not None:
            found[seed] = record if cells.record(cell) is not None else {**record, "tasks": {}}
    return found


def _check_pairs(arm: Arm, runs: Mapping[str, Mapping[int, Record]], notes: list[str]) -> None:
    for seed, record in runs[arm.name].items():
        if record["eval_loss_end"] is None:
            raise UserError(f"{arm.name}, seed {seed}: was not evaluated; give base.eval_data, or more data")
        other = runs[arm.matched].get(seed) if arm.matched else None
        if other is None:
            continue
        if found := what_differs(record, other):
            raise UserError(
                f"{arm.name} and {arm.matched}, seed {seed}, cannot be compared: {'; '.join(found)}; take the older "
                "of the two out of the results file, delete its folder in cells, and run again"
            )
        if other_versions := _other_versions(record, other):
            notes.append(
                f"{arm.name} and {arm.matched}: runs of one seed were made with different versions of "
                f"{', '.join(other_versions)}"
            )
        if abs(record["eval_loss_start"] - other["eval_loss_start"]) > SAME_START:
            notes.append(
                f"{arm.name} starts from a held-out loss of {figures.loss(record['eval_loss_start'])}, "
                f"{arm.matched} from {figures.loss(other['eval_loss_start'])}"
            )


def _other_versions(a: Record, b: Record) -> list[str]:
    return [name for name, version in versions([a, b]).items() if ", " in version]


def what_differs(a: Record, b: Record) -> list[str]:
    """In words, what makes two runs of one seed incomparable: tokens, steps, data, order, evaluation."""
    found = [
        f"{key} {figures.integer(a[key])} and {figures.integer(b[key])}"
        for key in ("tokens", "steps")
        if a[key] != b[key]
    ]
    for key in (*SAME_FOR_ALL, "seed"):
        if not same_settings({key: a["settings"].get(key)}, {key: b["settings"].get(key)}):
            found.append(f"{key} is not the same")
    mine, theirs = (one["tasks"].get("results", {}) for one in (a, b))
    found += [
        f"the definition of {name} is not the same"
        for name in mine
        if name in theirs and mine[name].get("version") != theirs[name].get("version")
    ]
    mine, theirs = (one["tasks"].get("data", {}) for one in (a, b))
    found += [f"the data of {name} is not the same" for name in mine if name in theirs and mine[name] != theirs[name]]
    return found


def _arm(
    arm: Arm,
    comparison: Comparison,
    cells: Cells,
    runs: Mapping[str, Mapping[int, Record]],
    curves: Mapping[str, dict[str, Any] | None],
    notes: list[str],
) -> dict[str, Any]:
    own = runs[arm.name]
    rate = cells.chosen_rate(arm)
    losses = {seed: record["eval_loss_end"] for seed, record in own.items()}
    controls = list(runs[arm.matched].values()) if arm.matched else []
    same = are_copies([record["eval_loss_end"] for record in controls])
    copies = same or one_order(arm.config)
    entry: dict[str, Any] = {
        "name": arm.name,
        "method": arm.config.method,
        "matched": arm.matched,
        "learning_rate": rate if arm.config.apex.stage_learning_rates is None else None,
        "rates": _rates(arm, cells),
        "loss": mean_by_seed(losses),
        "loss_start": mean_by_seed({seed: record["eval_loss_start"] for seed, record in own.items()}),
        **{
            key: mean_by_seed({seed: record[key] for seed, record in own.items()})
            for key in ("tokens", "seconds", "peak_memory_bytes", "trainable_parameters", "trainable_fraction")
        },
        "curve": _mean_curve(list(own.values())),
        "tasks": task_scores(own, runs[arm.matched] if arm.matched else {}, copies=copies),
        "tasks_average": tasks_average(own, runs[arm.matched] if arm.matched else {}, copies=copies),
    }
    if len(arm.learning_rates) > 1 and rate in (min(arm.learning_rates), max(arm.learning_rates)):
        notes.append(f"{arm.name}: the chosen learning rate {rate:g} is at the end of those tried; try further ones")
    if arm.matched is None:
        return entry
    control = comparison.arm(arm.matched)
    other = runs[control.name]
    if (tried := len(arm.learning_rates)) > len(control.learning_rates):
        notes.append(
            f"{arm.name}: its learning rate is the best of {tried}, that of {control.name} of "
            f"{len(control.learning_rates)}: a part of the difference may come from that; give learning_rates at the "
            "top"
        )
    if same:
        notes.append(
            f"{control.name} has the same loss, bit for bit, at all seeds: they are copies of one run, and no interval "
            "is given (streamed data come in the same order at every seed)"
        )
    other_losses = {seed: record["eval_loss_end"] for seed, record in other.items()}
    entry["difference"] = paired_differences(losses, other_losses, copies=copies)
    if rate is not None and rate != cells.chosen_rate(control) and rate in control.learning_rates:
        at_rate = {seed: cells.trained(cells.cell(control, seed, rate)) for seed in losses}
        entry["difference_at_same_rate"] = paired_differences(
            losses, {seed: record["eval_loss_end"] for seed, record in at_rate.items() if record}, copies=copies
        )
    paired = (entry["difference"] or {"n": 0})["n"]
    if 0 < paired < max(len(own), len(other)):
        notes.append(
            f"{arm.name} has {len(own)} finished seeds and {control.name} {len(other)}: their means and curves are not "
            f"of the same seeds; the difference is over the {paired} that both have"
        )
    entry["time_ratio"] = _time_ratio(arm, own, other, notes)
    entry["needed"] = _needed(own, curves[control.name], copies=copies)
    return entry


def mean_by_seed(by_seed: Mapping[int, Any]) -> dict[str, Any] | None:
    if not by_seed or any(value is None for value in by_seed.values()):
        return None
    values = list(by_seed.values())
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": spread, "by_seed": {str(k): v for k, v in by_seed.items()}}


def _rates(arm: Arm, cells: Cells) -> list[dict[str, Any]]:
    """What the choice of the learning rate rests on."""
    if len(arm.learning_rates) == 1:
        return []
    rows = []
    for rate in arm.learning_rates:
        found = [cells.trained(cells.cell(arm, seed, rate)) for seed in cells.comparison.selection_seeds]
        losses = [record["selection_loss"] for record in found if record]
        rows.append({"rate": rate, "n": len(losses), "selection_loss": statistics.fmean(losses) if losses else None})
    return rows


def paired_differences(
    own: Mapping[int, float], other: Mapping[int, float], *, copies: bool = False
) -> dict[str, Any] | None:
    """own - other, over the seeds that both have. copies: as `statistics.difference`."""
    gaps = {seed: own[seed] - other[seed] for seed in own if seed in other}
    if not gaps:
        return None
    found = difference(list(gaps.values()), copies=copies)
    by_seed = {str(seed): gap for seed, gap in gaps.items()}
    return {**dataclasses.asdict(found), "shown": found.shown, "by_seed": by_seed}


def _time_ratio(
    arm: Arm, own: Mapping[int, Record], other: Mapping[int, Record], notes: list[str]
) -> dict[str, Any] | None:
    """Seconds over the control's, of the seeds at which both ran on the same hardware: median, lowest, highest."""
    name = arm.name
    pairs = {seed: (own[seed], other[seed]) for seed in own if seed in other}
    alike = {
        seed: a["seconds"] / b["seconds"] for seed, (a, b) in pairs.items() if hardware_text(a) == hardware_text(b)
    }
    if other_hardware := len(pairs) - len(alike):
        rest = f"its time ratio is over the other {len(alike)}" if alike else "no time ratio"
        notes.append(f"{name}: {other_hardware} of its runs had other hardware than the control's; {rest}")
    if not alike:
        return None
    for which, runs in ((name, own), (arm.matched, other)):
        seconds = [runs[seed]["seconds"] for seed in alike]
        if max(seconds) > UNSTEADY * min(seconds):
            notes.append(
                f"{which}: its runs took from {figures.duration(min(seconds))} to {figures.duration(max(seconds))}, so "
                "other work was on the machine, and time ratios tell little"
            )
    values = list(alike.values())
    found = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {**found, "by_seed": {str(seed): value for seed, value in alike.items()}}


def _plain_curve(control: Arm, cells: Cells, notes: list[str]) -> dict[str, Any] | None:
    """Plain training at all multiples of its tokens, over the seeds that have them all; None without such a seed, or
    with fewer than two lengths. Multiples that come to as many tokens, as parts of a short epoch do, are one."""
    rate, multiples = cells.chosen_rate(control), sorted(cells.comparison.settings.plain_multiples)
    if rate is None or len(multiples) < 2:
        return None
    rows = {}
    for seed in cells.comparison.settings.seeds:
        records = [cells.trained(cells.cell(control, seed, rate, multiple)) for multiple in multiples]
        if all(records):
            rows[seed] = [(record["tokens"], record["eval_loss_end"]) for record in records if record]
    kept = [0]
    for number in range(1, len(multiples)):
        if all(row[number][0] > row[kept[-1]][0] for row in rows.values()):
            kept.append(number)
    if rows and len(kept) < len(multiples):
        notes.append(f"{control.name}: some of plain_multiples come to as many tokens as others, and are left out")
    if not rows or len(kept) < 2:
        return None
    return {
        "multiples": [multiples[number] for number in kept],
        "tokens": {str(seed): [row[number][0] for number in kept] for seed, row in rows.items()},
        "losses": {str(seed): [row[number][1] for number in kept] for seed, row in rows.items()},
    }


def _needed(own: Mapping[int, Record], curve: dict[str, Any] | None, *, copies: bool) -> dict[str, Any] | None:
    seeds = [seed for seed in own if curve is not None and str(seed) in curve["tokens"]]
    if curve is None or not seeds:
        return None
    losses = [own[seed]["eval_loss_end"] for seed in seeds]
    multiples = np.array([[n / own[seed]["tokens"] for n in curve["tokens"][str(seed)]] for seed in seeds])
    needed = tokens_needed(losses, multiples, np.array([curve["losses"][str(seed)] for seed in seeds]))
    if copies:
        needed = dataclasses.replace(needed, interval=None)
    return {**dataclasses.asdict(needed), "text": needed.text}


def _mean_curve(records: Sequence[Record]) -> dict[str, list[float]] | None:
    """Mean over seeds of the held-out losses on the way; of the first seed alone where they were taken elsewhere."""
    curves = [record["curve"] for record in records]
    alike = [curve for curve in curves if len(curve["loss"]) == len(curves[0]["loss"])]
    if not alike:
        return None
    return {key: np.mean([curve[key] for curve in alike], axis=0).tolist() for key in ("tokens", "seconds", "loss")}


def task_scores(own: Mapping[int, Record], other: Mapping[int, Record], *, copies: bool = False) -> dict[str, Any]:
    """Task -> its metric, mean over seeds and paired difference. copies: as `statistics.difference`."""
    found: dict[str, Any] = {}
    names = [name for record in own.values() for name in record["tasks"].get("results", {})]
    for name in dict.fromkeys(names):
        metric = _metric(
            next(r["tasks"]["results"][name] for r in own.values() if name in r["tasks"].get("results", {}))
        )
        mine, theirs = (
            {
                seed: record["tasks"]["results"][name][metric]
                for seed, record in some.items()
                if figures.is_number(record["tasks"].get("results", {}).get(name, {}).get(metric))
            }
            for some in (own, other)
        )
        gaps = paired_differences(mine, theirs, copies=copies)
        found[name] = {"metric": metric, **(mean_by_seed(mine) or {}), "difference": gaps}
    return found


def tasks_average(own: Mapping[int, Record], other: Mapping[int, Record], *, copies: bool = False) -> dict[str, Any]:
    """The mean over tasks (perplexities left out), by seed: its mean over seeds and paired difference, of the seeds
    that have a score in every task. Empty where none has, or where there is one task alone."""
    mine, theirs = (_averages(task_scores(some, {})) for some in (own, other))
    return {**(mean_by_seed(mine) or {}), "difference": paired_differences(mine, theirs, copies=copies)} if mine else {}


def _averages(scores: Mapping[str, Any]) -> dict[int, float]:
    averaged = [one.get("by_seed", {}) for one in scores.values() if "perplexity" not in one["metric"]]
    if len(averaged) < 2:
        return {}
    seeds = set.intersection(*(set(by_seed) for by_seed in averaged))
    return {int(seed): statistics.fmean(one[seed] for one in averaged) for seed in sorted(seeds, key=int)}


def _metric(values: Mapping[str, Any]) -> str:
    return next((key for key in PREFERRED if key in values), str(values.get("main_metric")))


def commits(records: Sequence[Record]) -> list[str]:
    """The commits that records were made at, with a word where the package's files differed from them."""
    states = [record["environment"] for record in records]
    return different(
        [
            f"{commit} (changed)" if state.get("git_changed") else commit
            for state in states
            if (commit := state.get("git_commit"))
        ]
    )


def versions(records: Sequence[Record]) -> dict[str, str]:
    """Package -> its version, or several where records were made with different ones."""
    told = [record["environment"].get("packages", {}) for record in records]
    names = dict.fromkeys(name for packages in told for name in packages)
    return {name: ", ".join(different([str(one[name]) for one in told if one.get(name)])) for name in names}


def hardware_text(record: Record) -> str:
    environment = record["environment"]
    gpus = ", ".join(gpu["name"] for gpu in environment.get("gpus") or [])
    cpus = f"{environment.get('cpu_count')} CPU cores, {environment.get('threads')} threads"
    return f"{gpus + '; ' if gpus else ''}{cpus}; {environment.get('platform')}"


def different(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))
