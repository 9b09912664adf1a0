"""`graftlm pilot`: short paired runs, stopped as soon as they are clear, on a small share of the run's tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from graftlm.comparing.config import ONE_ORDER, check_one_process, one_order
from graftlm.comparing.process import RunFailed, check_writable, discard, run_record
from graftlm.comparing.results import Record
from graftlm.comparing.statistics import FEWEST, LEVEL, are_copies
from graftlm.comparing.verdict import FASTER, MINIMUM_EFFECT, PAIRS, check, judge, to_check
from graftlm.environment import describe_environment
from graftlm.errors import UserError
from graftlm.files import locked, read_json, write_json
from graftlm.identity import key_of, same_settings, settings_of
from graftlm.reporting import figures
from graftlm.training.config import RunConfig
from graftlm.training.control import control_config

SHARE = 0.05
FEWEST_STEPS = 10
"""Optimizer steps under which a run tells nothing."""
ASSESSED = 8
"""Of a pilot run's sequences one in so many is assessed beforehand at most; they count as tokens."""


@dataclass(frozen=True)
class Plan:
    """How a pilot's runs follow from the run that is planned."""

    config: RunConfig
    """Of a pilot run, without seed and folder."""
    planned_tokens: int
    steps: int
    pairs: int
    """At most."""
    run_tokens: int
    """That a run trains on."""
    assessed_tokens: int
    """Assessed for a pair, at most."""

    @property
    def most_tokens(self) -> int:
        """Of all pairs, and of the faster control's runs."""
        return self.pairs * (2 * self.run_tokens + self.assessed_tokens) + FEWEST * self.run_tokens


def plan_pilot(config: RunConfig, total_steps: int, *, share: float = SHARE, pairs: int = PAIRS) -> Plan:
    """The same run with its whole schedule and its stages scaled down, so that as many pairs as possible, at most
    `pairs`, and the faster control's runs fit into the budget.

    total_steps: of the planned run. Raises UserError where a run would be too short to tell anything.
    """
    if config.method == "full":
        raise UserError("method: full is what a pilot compares with; give the method to try, e.g. method=apex")
    check_one_process(config, "distributed.strategy")
    if config.apex.stage_by == "epochs" and config.max_steps > 0 and config.method == "apex":
        raise UserError("apex.stage_by: epochs beside max_steps: a pilot has no epochs; give stage_by: steps")
    if config.dynamic_loading.every:
        raise UserError("dynamic_loading: a run's losses decide what it reads next, so no control could see the same")
    if one_order(config):
        raise UserError(f"{ONE_ORDER}, and pairs tell little more than one; try it without, on a part (data.limit)")
    if pairs < FEWEST:
        raise UserError(f"pairs: {pairs} give no interval; at least {FEWEST}")
    step_tokens = config.sequences_per_step * config.max_length
    stages = config.apex.stages if config.method == "apex" else 1
    fewest = max(FEWEST_STEPS, 2 * stages)
    while (steps := int(share * total_steps / _runs(pairs))) < fewest and pairs > FEWEST:
        pairs -= 1
    if steps < fewest:
        needed = -(-fewest * _runs(pairs) // share)
        raise UserError(
            f"max_steps: {share:.1%} of {total_steps:,} steps are {steps} for each run of {pairs} pairs, and under "
            f"{fewest} tell nothing; a pilot is for runs of {needed:,.0f} steps or more (or give a larger share)"
        )
    scale = steps / total_steps
    apex = config.apex
    assessed = min(apex.assess_samples, max(1, steps * config.sequences_per_step // ASSESSED))
    length, by = apex.stage_length, apex.stage_by
    if by == "epochs":  # a pilot sees a part of one epoch: stages keep their share of the run instead
        share_of_run = apex.stage_length / config.num_train_epochs if apex.stage_length else 1 / apex.stages
        length, by = steps * share_of_run, "steps"
    elif length is not None:
        length = max(1.0, length * scale)
    small = dataclasses.replace(apex, assess_samples=assessed, stage_length=length, stage_by=by)
    pilot_config = dataclasses.replace(
        config,
        apex=small,
        max_steps=steps,
        control=False,
        save_steps=0,
        save_total_limit=0,  # a run that is shorter than writing its state, perhaps
        **_intervals(config, steps, scale),
    )
    return Plan(
        pilot_config, total_steps * step_tokens, steps, pairs, steps * step_tokens, assessed * config.max_length
    )


def _intervals(config: RunConfig, steps: int, scale: float) -> dict[str, Any]:
    """The section of a method that does something every so many steps, scaled as the run is, to a step at least."""

    def scaled(length: float) -> int:
        return max(1, round(length * scale))

    relora, hft, lift, ist = config.relora, config.hft, config.lift, config.ist
    if config.method == "relora":  # below 1 they are shares of the run
        spans = {name: value for name in ("interval", "warmup", "warm_start") if (value := getattr(relora, name)) >= 1}
        changes: dict[str, Any] = {name: scaled(value) for name, value in spans.items()}
        if relora.warm_start * scale < steps <= changes.get("warm_start", 0):
            changes["warm_start"] = steps - 1  # adapters train in the run, so they do here
        return {"relora": dataclasses.replace(relora, **changes)}
    if config.method == "hft" and hft.round_steps is not None:
        return {"hft": dataclasses.replace(hft, round_steps=scaled(hft.round_steps))}
    if config.method == "hft" and config.max_steps <= 0 and config.num_train_epochs > 1:  # a round is an epoch
        return {"hft": dataclasses.replace(hft, round_steps=max(1, round(steps / config.num_train_epochs)))}
    if config.method == "lift" and lift.interval:
        return {"lift": dataclasses.replace(lift, interval=scaled(lift.interval))}
    if config.method == "ist":
        return {"ist": dataclasses.replace(ist, interval=scaled(ist.interval))}
    return {}


def _runs(pairs: int) -> float:
    """How many runs' tokens so many pairs take, with what is assessed, and with the faster control's."""
    return pairs * (2 + 1 / ASSESSED) + FEWEST


def pilot(
    config: RunConfig,
    *,
    minimum_effect: float = MINIMUM_EFFECT,
    share: float = SHARE,
    pairs: int = PAIRS,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run pairs (seeds config.seed, config.seed + 1, ...) until the answer is clear, the budget or the pairs are used
    up, and then, unless it does not pay, plain training at a higher rate; prints the answer in one line and writes it
    to OUTPUT_DIR-pilot/pilot.json, which it returns.

    A pilot that was stopped goes on: finished runs are kept there. Raises UserError for a planned run that is too
    short, without held-out data, or whose pilot runs fail.
    """
    console = console or Console()
    plan = plan_pilot(config, planned_steps(config), share=share, pairs=pairs)
    folder = Path(f"{config.output_dir}-pilot")
    check_writable(folder)
    with locked(folder, busy="another pilot is running there; wait, or give another output_dir"):
        return _pilot(config, plan, folder, minimum_effect, console)


def _pilot(config: RunConfig, plan: Plan, folder: Path, minimum_effect: float, console: Console) -> dict[str, Any]:
    gains: list[float] = []
    own: list[Record] = []
    records: list[Record] = []
    verdict = judge(gains, minimum_effect=minimum_effect, pairs=plan.pairs)
    while verdict.answer == "undecided" and len(gains) < plan.pairs:
        record, control = _run_pair(plan.config, config.seed + len(gains), folder, console)
        if record["eval_loss_end"] is None:
            raise UserError("eval_data: there is none to measure on; give eval_data, or an eval_fraction above 0")
        own.append(record)
        records += [record, control]
        gains.append(control["eval_loss_end"] - record["eval_loss_end"])
        verdict = judge(gains, minimum_effect=minimum_effect, pairs=plan.pairs)
        console.print(
            f"pair {len(gains)} of at most {plan.pairs}: gain {gains[-1]:+.4f} nats per token", highlight=False
        )
        if are_copies([control["eval_loss_end"] for control in records[1::2]]):
            break  # pairs that are copies of one another are no sample, however many
    if to_check(verdict):
        so_far = "ahead of plain training" if verdict.answer == "pays" else "not clear yet"
        console.print(f"{so_far}; is it ahead of plain training at {FASTER:g} times the rate?", highlight=False)
        faster = [
            _run_faster(plan.config, config.seed + number, own[number]["stage_starts"], folder, console)
            for number in range(FEWEST)
        ]
        records += faster
        over = [
            control["eval_loss_end"] - record["eval_loss_end"] for control, record in zip(faster, own, strict=False)
        ]
        verdict = check(verdict, over, minimum_effect=minimum_effect)
    assessed = len(own) * plan.assessed_tokens if config.method == "apex" else 0
    used = sum(record["tokens"] for record in records) + assessed
    report = {
        "method": config.method,
        "model": config.model,
        **dataclasses.asdict(verdict),
        "gains": gains,
        "minimum_effect": minimum_effect,
        "level": LEVEL,
        "faster": FASTER,
        "pairs_at_most": plan.pairs,
        "steps": plan.steps,
        "tokens_used": used,
        "tokens_planned": plan.planned_tokens,
        "share_used": used / plan.planned_tokens,
        "environment": describe_environment(),
    }
    report["text"] = text(report)
    write_json(folder / "pilot.json", report)
    console.print(report["text"], highlight=False, soft_wrap=True)
    console.print(str(folder / "pilot.json"), highlight=False, soft_wrap=True)
    return report


def text(report: Mapping[str, Any]) -> str:
    """The answer in one line."""
    name = figures.method_name(report["method"])
    said = {"pays": f"{name} pays", "does not": f"{name} does not pay", "undecided": f"{name}: undecided"}
    between = "no interval: pairs that are all the same are no sample"
    if report["interval"] is not None:
        between = "95% interval {:+.4f} to {:+.4f}".format(*report["interval"])
    checked = ""
    if report["over_faster"] is not None:
        told = report["over_faster_interval"]
        ends = "no interval" if told is None else "{:+.4f} to {:+.4f}".format(*told)
        checked = f", {report['over_faster']:+.4f} ({ends}) over plain training at {report['faster']:g} times the rate"
    return (
        f"{said[report['answer']]}: gain {report['gain']:+.4f} nats per token ({between}, "
        f"minimum effect {report['minimum_effect']:g}) over {report['pairs']} pairs of {report['steps']} steps"
        f"{checked}, {report['share_used']:.1%} of the planned tokens"
    )


def planned_steps(config: RunConfig) -> int:
    """Optimizer steps of the run as planned; where it goes by epochs, the data is tokenised to count them."""
    if config.max_steps > 0:
        return config.max_steps
    from graftlm.models import load_tokenizer
    from graftlm.training.data import prepare_data
    from graftlm.training.estimates import steps_per_epoch, total_steps

    code = {"trust_remote_code": config.trust_remote_code}
    tokenizer = load_tokenizer(config.model, chat_template=config.chat_template, **code)
    blocks = prepare_data(config, tokenizer).statistics.blocks
    assert blocks is not None  # streaming needs max_steps
    steps = total_steps(config, steps_per_epoch(config, blocks, processes=1))
    assert steps is not None
    return steps


def _run_pair(config: RunConfig, seed: int, folder: Path, console: Console) -> tuple[Record, Record]:
    """Method and control with one seed: the same tokens, order and schedule."""
    own = dataclasses.replace(config, seed=seed, output_dir=str(folder / f"seed{seed}"))
    record = _run(own, console)
    control = dataclasses.replace(
        control_config(own, record["stage_starts"]), output_dir=str(folder / f"seed{seed}-control")
    )
    return record, _run(control, console)


def _run_faster(config: RunConfig, seed: int, stage_starts: Sequence[int], folder: Path, console: Console) -> Record:
    """The control of one seed at FASTER times its learning rate."""
    rates = config.apex.stage_learning_rates
    apex = dataclasses.replace(config.apex, stage_learning_rates=rates and tuple(FASTER * rate for rate in rates))
    faster = dataclasses.replace(
        control_config(config, stage_starts),
        seed=seed,
        learning_rate=FASTER * config.learning_rate,
        apex=apex,
        output_dir=str(folder / f"seed{seed}-faster"),
    )
    return _run(faster, console)


def _run(config: RunConfig, console: Console) -> Record:
    """A finished run from its record in the folder, or a new one."""
    kept = Path(config.output_dir).with_suffix(".json")
    settings = settings_of(config)
    if kept.exists():
        found = read_json(kept)
        if found["key"] != key_of(settings):
            raise UserError(
                f"{kept}: is of a pilot with other settings; delete {kept.parent}, or give another output_dir"
            )
        if same_settings(found["record"]["settings"], settings):
            discard(Path(config.output_dir))  # a kill may have come before
            return dict(found["record"])  # else a default has changed since, and it is run again
    with console.status(kept.stem) as status:
        try:
            record = run_record(config, settings, say=lambda line: status.update(f"{kept.stem}: {line[:100]}"))
        except RunFailed as error:
            raise UserError(f"a run of the pilot failed: {error}") from error
    write_json(kept, {"key": key_of(settings), "record": record})
    discard(Path(config.output_dir))
    return record
