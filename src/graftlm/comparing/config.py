"""What a comparison is: its YAML file, and the arms that follow from it."""

import dataclasses
import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from yaml.nodes import MappingNode, Node

from graftlm.apex_config import ApexConfig
from graftlm.comparing.statistics import few_seeds_note
from graftlm.configuring import config_from_layers, load_dataclass, place_of, take
from graftlm.errors import UserError
from graftlm.methods.sparse_settings import ReweightingSettings
from graftlm.training.config import RunConfig, SourceConfig
from graftlm.training.data.sources import iterate_rows
from graftlm.yaml_nodes import child_of, parse_file

CONTROL = "control"
SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio")
STAGE_SCHEDULE = ("stages", "stage_by", "stage_length", "stage_learning_rates", "rewarmup_ratio")
"""Of apex: what a control takes over from the arm that it is matched to, beside SCHEDULE."""
SAME_FOR_ALL = (
    *("model", "dtype", "data", "eval_data", "selection_data", "eval_fraction", "eval_max_blocks", "task"),
    *("bf16", "max_length", "packing", "document_boundaries", "assistant_only_loss", "truncation", "chat_template"),
    *("streaming", "max_steps", "num_train_epochs"),
)
"""What decides where an arm starts, what it is trained on, in which order, and what it is measured on and in which
numbers."""
ONE_ORDER = "streaming: data come in one order, or one of two or three, whatever the seed, so seeds are copies of runs"
OF_ANY_METHOD = ("distributed", "distillation", "reweighting", "dynamic_loading")
"""Sections of a config that are no method's own: plain training has a use for them."""
NOT_IN_BASE = {
    "output_dir": "a comparison names its run folders itself; give output_dir at the top",
    "seed": "give seeds at the top",
    "control": "every arm is compared to its control anyway; leave it out",
    "stage_starts": "a control gets those of the arm that it is matched to; leave it out",
}


@dataclass(frozen=True)
class CompareConfig:
    """A comparison (`graftlm compare CONFIG.yaml`)."""

    base: Node
    """What all arms share: the keys of a run's config, without output_dir and seed."""
    variants: dict[str, Node]
    """Name of an arm -> the keys in which it differs from base: `lora: {method: lora, lora.rank: 64}`. An arm may have
    learning_rates of its own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each arm runs once with each; runs of one seed see the same tokens in the same order."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates to choose from, for the control and every arm that has none of its own; none: base's."""
    selection_seeds: tuple[int, ...] = ()
    """Seeds at which all learning rates are run; the others run the chosen one. None given: all seeds."""
    plain_multiples: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0)
    """Plain training is run with its whole schedule at these multiples of the tokens; 1 alone: only at once."""
    tasks: tuple[str, ...] = ()
    """Tasks on which each arm's final models are evaluated (graftlm eval --tasks)."""
    task_limit: int | None = None
    """Questions a task; None: all."""
    task_data_dir: str | None = None
    """Folder with the tasks' data (graftlm eval --data-dir); None: from the Hub."""
    task_batch_size: int = 1
    """Sequences a pass when tasks are measured: faster above 1, and scores differ by rounding."""
    task_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the weights are held in when tasks are measured."""
    allow_code_execution: bool = False
    """Let humaneval run, contained, programs that the models wrote."""
    output_dir: str = "runs/compare"
    """Run folders, tables, plots and report."""
    results: str | None = None
    """JSON file in which finished runs are kept and found again; None: results.json in output_dir."""
    keep: bool = False
    """Keep models and checkpoints of finished runs."""

    def __post_init__(self) -> None:
        if not self.variants:
            raise UserError("variants: there is none; give at least one, e.g. apex: {method: apex}")
        for name in ("seeds", "selection_seeds", "learning_rates", "plain_multiples", "tasks"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"{name}: {list(values)} has a value twice; each once")
        if not self.seeds:
            raise UserError("seeds: there is none; give at least one, and three for an interval")
        if strange := set(self.selection_seeds) - set(self.seeds):
            raise UserError(f"selection_seeds: {min(strange)} is not among seeds {list(self.seeds)}")
        for name in ("learning_rates", "plain_multiples"):
            if any(value <= 0 for value in getattr(self, name)):
                raise UserError(f"{name}: every value must be above 0")
        for name in ("task_limit", "task_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} must be at least 1")


@dataclass(frozen=True)
class Arm:
    """One way of training in a comparison."""

    name: str
    config: RunConfig
    """Without seed, output folder and, for a control, the steps at which stages begin."""
    learning_rates: tuple[float, ...]
    matched: str | None
    """Name of the control with the same schedule; None for a control."""
    follows: str | None = None
    """Of a control: name of the arm whose stages its learning rate follows; None if the schedule has no stages."""


@dataclass(frozen=True)
class Comparison:
    """A comparison with everything resolved; controls stand first."""

    settings: CompareConfig
    arms: tuple[Arm, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def controls(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.matched is None)

    @property
    def folder(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def results_path(self) -> Path:
        return Path(self.settings.results) if self.settings.results else self.folder / "results.json"

    @property
    def selection_seeds(self) -> tuple[int, ...]:
        return self.settings.selection_seeds or self.settings.seeds

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read and check a comparison. Raises UserError with file, line and nearest key for what is unknown or not allowed,
    and for arms that could not be compared."""
    check_arms(path, overrides)
    settings: CompareConfig = load_dataclass(path, CompareConfig, overrides)
    for key, why in NOT_IN_BASE.items():
        if take(settings.base, key)[0] is not None:
            raise UserError(f"{place_of(settings.base, key)}base.{key}: {why}")
    base = config_from_layers(settings.base)
    check_one_process(base, "base.distributed")
    if not base.eval_data and not base.eval_fraction:
        raise UserError("base.eval_data: there is none to compare losses on; give it, or an eval_fraction above 0")
    _check_multiples(settings.plain_multiples, base.max_steps)
    variants = [_variant(name, node, base, settings) for name, node in settings.variants.items()]
    controls, matched = _controls(base, variants, settings)
    arms = [*controls, *(dataclasses.replace(arm, matched=matched[arm.name]) for arm in variants)]
    notes = few_seeds_note(settings.seeds)
    if len(settings.seeds) > 1 and one_order(base):
        notes.append(f"{ONE_ORDER}, and no interval is given: leave streaming out of base for one")
    chooses = any(len(arm.learning_rates) > 1 for arm in arms)
    if chooses and base.selection_data:
        _check_apart(base)
    elif chooses:
        arms = [dataclasses.replace(arm, config=_halved(arm.config)) for arm in arms]
        notes.append("learning rates are chosen on one half of eval_data's documents, and the other half is reported")
    return Comparison(settings, tuple(arms), tuple(notes))


def _variant(name: str, node: Node, base: RunConfig, settings: CompareConfig) -> Arm:
    if name == CONTROL or name.startswith(f"{CONTROL} "):
        raise UserError(f"{place_of(node)}variants.{name}: the control is always there; give another name")
    rates, changes = take(node, "learning_rates", tuple[float, ...])
    own_rate, _ = take(changes, "learning_rate")
    for key, why in NOT_IN_BASE.items():
        if take(changes, key)[0] is not None:
            raise UserError(f"{place_of(changes, key)}variants.{name}.{key}: {why}")
    config = config_from_layers(settings.base, changes)
    if config.method == "full":
        config = dataclasses.replace(config, **_plain_sections(config))
    elif config.method != "apex":  # so that another base.apex leaves its finished runs what they are
        config = dataclasses.replace(config, apex=ApexConfig())
    check_one_process(config, f"{place_of(changes, 'distributed')}variants.{name}.distributed")
    if config.dynamic_loading.every:
        raise UserError(
            f"{place_of(changes, 'dynamic_loading')}variants.{name}.dynamic_loading: a run's losses decide what it "
            "reads next, so the arms would not see the same tokens; leave it out"
        )
    for key in SAME_FOR_ALL:
        if getattr(config, key) != getattr(base, key):
            raise UserError(
                f"{place_of(changes, key)}variants.{name}.{key}: is {_short(getattr(config, key))} here and "
                f"{_short(getattr(base, key))} in base, so the arms could not be compared; set it in base"
            )
    own, shared = config.sequences_per_step, base.sequences_per_step
    if own != shared:
        raise UserError(
            f"{place_of(changes, 'per_device_train_batch_size')}variants.{name}: a step has {own} sequences and base's "
            f"{shared} (per_device_train_batch_size x gradient_accumulation_steps), so the arms could not be compared"
        )
    if rates is not None and own_rate is not None:
        raise UserError(f"{place_of(node, 'learning_rates')}variants.{name}: learning_rate or learning_rates, not both")
    if rates is not None and (not rates or min(rates) <= 0 or len(set(rates)) < len(rates)):
        raise UserError(f"{place_of(node, 'learning_rates')}variants.{name}.learning_rates: different ones above 0")
    given = rates or ((config.learning_rate,) if own_rate is not None else settings.learning_rates)
    if config.method == "apex" and config.apex.stage_learning_rates is not None:
        given = ()  # stages have rates of their own, and the run's has no effect
    return Arm(name, config, given or (config.learning_rate,), matched=None)


def _controls(base: RunConfig, variants: Sequence[Arm], settings: CompareConfig) -> tuple[list[Arm], dict[str, str]]:
    """The controls, the first named `control`, and arm name -> name of its control."""
    found: list[Arm] = []
    matched: dict[str, str] = {}
    for arm in variants:
        config, staged = control_config(base, arm.config)
        same = next((control for control in found if control.config == config), None)
        if same is None:
            name = CONTROL if not found else f"{CONTROL} with the schedule of {arm.name}"
            rates = settings.learning_rates
            if config.apex.stage_learning_rates is not None:
                rates = ()
            same = Arm(name, config, rates or (config.learning_rate,), None, follows=arm.name if staged else None)
            found.append(same)
        matched[arm.name] = same.name
    return found, matched


def control_config(base: RunConfig, arm: RunConfig) -> tuple[RunConfig, bool]:
    """Plain training on `base` with the schedule of `arm`, and whether its learning rate follows `arm`'s stages.

    All settings of methods are at their defaults: they have no effect, and one control serves arms that differ in them.
    It learns from base's teacher, if there is one, and counts all samples alike (as training.control does).
    """
    plain = {**_plain_sections(base), "reweighting": ReweightingSettings()}
    staged = arm.method == "apex" and (arm.apex.stage_learning_rates is not None or arm.apex.rewarmup_ratio > 0)
    if staged:
        plain["apex"] = ApexConfig(**{name: getattr(arm.apex, name) for name in STAGE_SCHEDULE})
    schedule = {name: getattr(arm, name) for name in SCHEDULE}
    return dataclasses.replace(base, method="full", **schedule, **plain), staged


def _plain_sections(config: RunConfig) -> dict[str, Any]:
    """Every method's settings, at their defaults: plain training has no use for them."""
    sections = (f.name for f in fields(config) if dataclasses.is_dataclass(getattr(config, f.name)))
    return {name: type(getattr(config, name))() for name in sections if name not in OF_ANY_METHOD}


def _check_apart(base: RunConfig) -> None:
    """Raise UserError where learning rates would be chosen on what is reported."""
    for one, other in itertools.product(base.selection_data, base.eval_data):
        same = all(getattr(one, key) == getattr(other, key) for key in ("path", "split", "name", "pattern"))
        if same and (one.half is None or other.half is None or one.half == other.half):
            raise UserError(
                f"base.selection_data: {one.path} is in eval_data, too, so learning rates would be chosen on what is "
                "reported; give other data, leave it out (then halves of eval_data's documents are taken), or give "
                "half: even to one and half: odd to the other"
            )


def _halved(config: RunConfig) -> RunConfig:
    if not config.eval_data:
        raise UserError(
            "base.eval_data: learning rates are chosen on a part of it and the rest is reported; give eval_data, or "
            "selection_data as well"
        )
    if len({source.half for source in config.eval_data}) > 1 or config.eval_data[0].half:
        raise UserError("base.eval_data: is halved for choosing learning rates; give selection_data instead of half")
    for source in config.eval_data:
        if Path(source.path).expanduser().exists() and _documents(source, 2) < 2:
            raise UserError(
                f"base.eval_data: {source.path} is a single document, which cannot be halved to choose learning "
                "rates; give selection_data, or several documents"
            )
    even, odd = (
        tuple(dataclasses.replace(source, half=half) for source in config.eval_data) for half in ("even", "odd")
    )
    return dataclasses.replace(config, selection_data=even, eval_data=odd)


def _documents(source: SourceConfig, most: int) -> int:
    """How many documents a source has, as far as `most`: a text may come in several rows."""
    return sum(1 for _ in itertools.islice((row for row in iterate_rows(source) if row.first), most))


def one_order(config: RunConfig) -> bool:
    """Whether seeds are no sample of the orders of the data: a stream comes as it lies, and of several sources the seed
    only decides which begins."""
    return config.streaming


def check_one_process(config: RunConfig, where: str) -> None:
    """Raise UserError for a run of several processes: those of comparisons and pilots have one each."""
    if config.distributed.strategy != "none":
        raise UserError(
            f"{where}: strategy {config.distributed.strategy}, and these runs have one process each, so a step would "
            "have fewer sequences; leave it out, and raise gradient_accumulation_steps to as many as all processes have"
        )


def check_arms(path: str | Path, overrides: Sequence[str]) -> None:
    """Raise UserError for an override of a variant that the file does not have: a new one is given whole
    (variants.NAME={...}), so this is a mistake in its name."""
    node = child_of(parse_file(str(path)), "variants")
    names = [str(key.value) for key, _ in node.value] if isinstance(node, MappingNode) else []
    for word in overrides:
        key = word.partition("=")[0]
        if key == "variants":
            return  # all of them are given there
        name, _, inner = key.removeprefix("variants.").partition(".")
        if key.startswith("variants.") and inner and not any(key.startswith(f"variants.{one}.") for one in names):
            near = difflib.get_close_matches(name, names, n=1)
            raise UserError(
                f"{key}: there is no variant {name}"
                + (f" (did you mean {near[0]}?)" if near else "")
                + "; a new one is "
                f"given whole, as in 'variants.{name}={{method: apex}}'"
            )
        names += [name] if key.startswith("variants.") and not inner else []


def scaled_steps(steps: int, multiple: float) -> int:
    """Optimizer steps of plain training at a multiple of the tokens."""
    return max(1, round(steps * multiple))


def _check_multiples(multiples: Sequence[float], steps: int) -> None:
    lengths: dict[int, float] = {}
    for multiple in multiples if steps > 0 else ():
        if (same := lengths.setdefault(scaled_steps(steps, multiple), multiple)) != multiple:
            raise UserError(
                f"plain_multiples: {same:g} and {multiple:g} times base.max_steps = {steps} are the same number of "
                "steps; leave one out, or give more steps"
            )


def _short(value: Any) -> str:
    text = ", ".join(source.path for source in value) if isinstance(value, tuple) else str(value)
    return text or "nothing"
