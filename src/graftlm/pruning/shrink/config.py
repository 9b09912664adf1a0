"""What `graftlm shrink` is told: its YAML file, and the training that all its phases share."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from yaml.nodes import Node

from graftlm.arguments import Count
from graftlm.configuring import config_from_layers, config_to_dict, load_dataclass, place_of, take
from graftlm.errors import UserError
from graftlm.pruning.settings import PruneSettings
from graftlm.training.config import DistillationConfig, RunConfig, SourceConfig
from graftlm.yaml_nodes import node_of

ORIGINAL = "original"
"""As distillation.teacher: the model that is shrunk, as it was."""
WSD = "warmup_stable_decay"
DECAY = 0.1
"""Share of all steps over which the learning rate falls at the end, and to which share of the highest it does."""
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": WSD,
    "warmup_ratio": 0.05,
    "apex": {"stages": 1},
}
"""Where the phases' training has other defaults than a run (Adapt-Pruner, appendix A)."""
AT_THE_TOP = ("model", "data", "eval_data", "output_dir", "max_steps", "distillation")
NOT_IN_TRAIN = {
    **dict.fromkeys(AT_THE_TOP, "it is given at the top, not under train"),
    "num_train_epochs": "give max_steps or tokens at the top",
    "method": "give recovery: plain or apex at the top",
    "phase": "phases follow from interleaves, shares and max_steps",
    "control": "a shrink has no control; compare with interleaves: 1, or with another recovery",
    "stage_starts": "phases have no stages but those of apex.stages",
    "distributed": "a shrink runs in one process",
}
NOT_IN_PRUNE = {
    **dict.fromkeys(("sparsity", "target_parameters"), "the phases have sizes of their own; give it at the top"),
}


@dataclass(frozen=True)
class ShrinkConfig:
    """Pruning and training in turn (`graftlm shrink CONFIG.yaml`)."""

    model: str
    """The model to shrink: a folder, a Hub id, a .gguf file, or a built-in name."""
    data: tuple[SourceConfig, ...]
    """Training data, also what pruning is calibrated on: a path, a list of paths, or a list of sources with weights."""
    eval_data: tuple[SourceConfig, ...] = ()
    """Held-out data; empty holds back train.eval_fraction of the training documents."""
    output_dir: str = "runs/shrink"
    """Folder of the phases, of the model that comes out (`model`), and of its report."""
    target_parameters: Count | None = None
    """Parameters of the model that comes out, at most, e.g. 100M; as close below as one component allows. Or
    sparsity."""
    sparsity: float | None = None
    """Share of every kind of component that goes, 0 to 1, from which target_parameters follows."""
    interleaves: int | None = None
    """N_P: in how many phases of pruning and training; None: as many as remove about 5% each. 1 prunes everything and
    then trains."""
    schedule: Literal["geometric", "linear"] = "geometric"
    """Sizes between: each phase leaves the same share of the last (the paper), or takes as many parameters (the
    authors' code)."""
    shares: Literal["growing", "equal"] = "growing"
    """Tokens of a phase: growing gives the i-th of T, from 0, the share 2 (i + 1) / (T (T + 1)) (eq. 11)."""
    max_steps: int | None = None
    """Optimizer steps of all phases together. Give this or tokens."""
    tokens: Count | None = None
    """Tokens of all phases together, padding counted."""
    recovery: Literal["plain", "apex"] = "plain"
    """How a phase trains: everything plainly, or with APEX, whose stages are laid out over each phase
    (train.apex.stages, 1 here)."""
    keep_moments: bool = False
    """The optimizer's moments of what remains survive pruning. False: a new optimizer in every phase, as in the
    authors' code."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """Learning from a teacher's predictions too; `teacher: original` is the model before it was pruned."""
    prune: Node | None = None
    """How a phase prunes: pruning's settings without sparsity and target_parameters. `iterations` are those of a
    phase; None shares adapt's 50 out among them."""
    train: Node | None = None
    """What the phases' training shares: the keys of a run, with learning_rate 2e-5, a warmup over 5% of all steps, and
    a linear decay over the last 10% to a tenth."""
    keep: Literal["last", "all"] = "last"
    """Weights of finished phases: last deletes them when the next has its own; all keeps them."""

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("data: no source given; name a file, a folder, or hub:OWNER/NAME")
        for one, other, example in (
            ("target_parameters", "sparsity", "target_parameters: 100M"),
            ("max_steps", "tokens", "max_steps: 1000"),
        ):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                raise UserError(f"{one}: give it or {other}, one of the two, e.g. {example}")
        for name in ("target_parameters", "interleaves", "max_steps", "tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}: {value} must be at least 1")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise UserError(f"sparsity: {self.sparsity} must be between 0 and 1, e.g. 0.5")


@dataclass(frozen=True)
class Shrink:
    """A shrink with everything resolved that does not need its model."""

    settings: ShrinkConfig
    run: RunConfig
    """The training of all phases as if it were one run: of `settings.model`, over all steps."""
    prune: PruneSettings
    """The pruning of all phases as if it were done at once."""

    @property
    def folder(self) -> Path:
        return Path(self.settings.output_dir)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; their YAML is a config again, which gives an equal shrink."""
        pruning, training = config_to_dict(self.prune), config_to_dict(self.run)
        if self.run.lr_scheduler_type == WSD:  # what follows from the length would stay if that is changed
            derived = decay_over(self.run.max_steps)
            given = {k: v for k, v in (self.run.lr_scheduler_kwargs or {}).items() if derived.get(k) != v}
            training["lr_scheduler_kwargs"] = given or None
        return _plain(self.settings) | {
            "prune": {key: value for key, value in pruning.items() if key not in NOT_IN_PRUNE},
            "train": {key: value for key, value in training.items() if key not in NOT_IN_TRAIN},
        }


def load_shrink(path: str | Path, overrides: Sequence[str] = ()) -> Shrink:
    """Read and check the config of a shrink. Raises UserError with file, line and nearest key for what is unknown or
    not allowed."""
    return _resolved(load_dataclass(path, ShrinkConfig, overrides), str(path))


def make_shrink(
    settings: ShrinkConfig, *, train: Mapping[str, Any] | None = None, prune: Mapping[str, Any] | None = None
) -> Shrink:
    """A shrink from Python values; `train`, `prune`: as under those keys in a file, in place of those in `settings`."""
    training, pruning = _node(train, "train") or settings.train, _node(prune, "prune") or settings.prune
    given = dataclasses.replace(settings, train=training, prune=pruning)
    return _resolved(given, "shrink")


def default_values(steps: int) -> dict[str, Any]:
    """`to_dict()` of a shrink of so many steps that is told nothing but what it must be told, which is left out."""
    plain = ShrinkConfig(model="", data=(SourceConfig(""),), target_parameters=1, max_steps=steps)
    told = ("model", "data", "target_parameters", "sparsity", "max_steps", "tokens")
    return {key: value for key, value in make_shrink(plain).to_dict().items() if key not in told}


def _node(given: Mapping[str, Any] | None, name: str) -> Node | None:
    return node_of(given, name) if given else None


def _plain(settings: ShrinkConfig) -> dict[str, Any]:
    """Everything but what is still unread."""
    return config_to_dict(dataclasses.replace(settings, train=None, prune=None))


def _resolved(settings: ShrinkConfig, name: str) -> Shrink:
    for key, forbidden in (("train", NOT_IN_TRAIN), ("prune", NOT_IN_PRUNE)):
        node = getattr(settings, key)
        for inner, why in forbidden.items() if node is not None else ():
            if take(node, inner)[0] is not None:
                raise UserError(f"{place_of(node, inner)}{key}.{inner}: {why}")
    return Shrink(settings, _training(settings, name), _pruning(settings, name))


def _layers(base: Mapping[str, Any], section: str, node: Node | None, name: str, kind: type[Any]) -> Any:
    layers = [node] if node is not None else []
    return config_from_layers(node_of(base, name), *layers, kind=kind, section=section)


def _pruning(settings: ShrinkConfig, name: str) -> PruneSettings:
    node = settings.prune
    if node is not None and take(node, "exact", bool)[0] is False:
        where = place_of(node, "exact")
        raise UserError(f"{where}prune.exact: every phase has a number of parameters to meet; leave it out")
    size = {"sparsity": settings.sparsity, "target_parameters": settings.target_parameters}
    found: PruneSettings = _layers(size, "prune", node, name, PruneSettings)
    return found


def _training(settings: ShrinkConfig, name: str) -> RunConfig:
    plain = _plain(settings)
    top = {key: plain[key] for key in ("model", "data", "eval_data", "output_dir")}
    if (teacher := settings.distillation.teacher) is not None:
        top["distillation"] = {**plain["distillation"], "teacher": settings.model if teacher == ORIGINAL else teacher}
    top["method"] = "apex" if settings.recovery == "apex" else "full"
    top["max_steps"] = settings.max_steps or 1  # where tokens are given: until the size of a step is known
    run: RunConfig = _layers({**top, **DEFAULTS}, "train", settings.train, name, RunConfig)
    for key in ("stage_learning_rates", "rewarmup_ratio"):
        if settings.recovery == "apex" and getattr(run.apex, key):
            where = place_of(settings.train, f"apex.{key}") if settings.train is not None else ""
            raise UserError(
                f"{where}train.apex.{key}: the phases share one schedule of the learning rate, which stages must leave "
                "as it is; leave it out"
            )
    if not run.save_total_limit:
        where = place_of(settings.train, "save_total_limit") if settings.train is not None else ""
        raise UserError(
            f"{where}train.save_total_limit: each phase goes on from a checkpoint of the last; give 1 or more"
        )
    step = run.sequences_per_step * run.max_length
    steps = settings.max_steps or math.ceil((settings.tokens or 0) / step)
    kwargs = run.lr_scheduler_kwargs
    if run.lr_scheduler_type == WSD:
        kwargs = {**decay_over(steps), **(kwargs or {})}
    return dataclasses.replace(run, max_steps=steps, lr_scheduler_kwargs=kwargs)


def decay_over(steps: int) -> dict[str, Any]:
    """The schedule's settings that follow from its length."""
    return {"num_decay_steps": math.ceil(DECAY * steps), "decay_type": "linear", "min_lr_ratio": DECAY}
