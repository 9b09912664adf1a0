"""What a comparison of ways of pruning is: its YAML file, and the arms and sizes that follow from it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from yaml.nodes import Node

from graftlm.arguments import Count
from graftlm.comparing.config import check_arms
from graftlm.comparing.pruning.jobs import Job, PruneJob, ShrinkJob
from graftlm.comparing.statistics import few_seeds_note
from graftlm.configuring import config_from_layers, load_dataclass, place_of, take
from graftlm.errors import UserError
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.shrink.config import ShrinkConfig, make_shrink
from graftlm.pruning.ways import is_uniform
from graftlm.training.config import SourceConfig
from graftlm.yaml_nodes import COMMAND_LINE, is_null, node_of

BASELINE = "llm-pruner"
"""Method of the control where none is named: uniform pruning, which always has to be beaten."""
ORIGINAL = "original"
NOT_IN_PRUNE = {
    "sparsity": "give sparsities at the top, which all variants are run at",
    "target_parameters": "give target_parameters at the top, which all variants are run at",
    "exact": "sparsity_of: parameters meets the number of parameters, channels does as published; give that at the top",
    "seed": "give seeds at the top",
}

NOT_IN_SHRINK = {
    **dict.fromkeys(("model", "data"), "it is given at the top, for all variants"),
    "output_dir": "a comparison names the folders of its cells itself",
    "sparsity": "give sparsities at the top, which all variants are run at",
    "target_parameters": "give target_parameters at the top, which all variants are run at",
    "train.seed": "give seeds at the top",
    "prune.seed": "give seeds at the top",
}


@dataclass(frozen=True)
class PruneCompareConfig:
    """A comparison of ways of pruning (`graftlm compare CONFIG.yaml` with `prune:`)."""

    model: str
    """What is pruned: a folder, a Hub id, a .gguf file, or a built-in name."""
    variants: dict[str, Node]
    """Name -> the keys in which it differs: `adapt: {method: adapt}`."""
    perplexity: tuple[str, ...]
    """Held-out texts, as graftlm eval --perplexity takes them; differences are about the first one."""
    prune: Node | None = None
    """What all variants share: keys of graftlm prune's settings, without sparsity, target_parameters and seed."""
    shrink: Node | None = None
    """Instead of prune: pruning and training in turn. Keys of graftlm shrink's config, without model, data, output_dir,
    sparsity, target_parameters and seeds."""
    sparsities: tuple[float, ...] = ()
    """Sizes as shares that go, 0 to 1; each variant is run at each."""
    sparsity_of: Literal["parameters", "channels"] = "parameters"
    """What a share is of. parameters: of the weights of all heads and channels, and every variant must meet the number
    of parameters that is left then; channels: of what each method itself counts, as papers have it (exact: false):
    heads and channels, slicegpt's hidden size, shortgpt's layers."""
    target_parameters: tuple[Count, ...] = ()
    """Sizes as numbers of parameters that must not be exceeded, instead of sparsities or beside them."""
    data: tuple[SourceConfig, ...] = ()
    """Text that importance is measured on (of shrink: that it trains on, too); none: the text that graftlm demo trains
    on."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the weights are held in while they are pruned and measured; bfloat16 takes half of the memory (of shrink: in
    measuring; its training has shrink.train.dtype)."""
    control: str | None = None
    """Variant that the others' differences are against; None: the uniform one with method llm-pruner, else the
    first."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Trials: each draws calibration sequences of its own, the same for all variants."""
    max_length: int | None = None
    """Tokens of context when perplexity and tasks are measured; None: the model's."""
    perplexity_words: int | None = None
    """Measure on the first so many words of each text only; None: all of it."""
    tasks: tuple[str, ...] = ()
    """Tasks that each pruned model is evaluated on (graftlm eval --tasks)."""
    task_limit: int | None = None
    """Questions a task; None: all."""
    task_data_dir: str | None = None
    """Folder with the tasks' data (graftlm eval --data-dir); None: from the Hub."""
    task_batch_size: int = 1
    """Sequences a pass when perplexity and tasks are measured: faster above 1, and scores differ by rounding."""
    allow_code_execution: bool = False
    """Let humaneval run, contained, programs that the models wrote."""
    output_dir: str = "runs/compare"
    """Folders of the cells, tables, plots and report."""
    results: str | None = None
    """JSON file in which finished cells are kept and found again; None: results.json in output_dir."""
    keep: bool = False
    """Keep the pruned models."""

    def __post_init__(self) -> None:
        if (self.prune is None) == (self.shrink is None):
            raise UserError("shrink: give it or prune, one of the two (prune: {} where variants share nothing)")
        if self.shrink is not None and self.sparsity_of == "channels":
            raise UserError("sparsity_of: a shrink's sizes are numbers of parameters; leave it out")
        if self.shrink is not None and not self.data:
            raise UserError("data: a shrink trains; name its data")
        for name in ("variants", "perplexity", "seeds"):
            if not getattr(self, name):
                raise UserError(f"{name}: there is none; give at least one")
        for name in ("seeds", "sparsities", "target_parameters", "perplexity", "tasks"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"{name}: {list(values)} has a value twice; each once")
        if not (self.sparsities or self.target_parameters):
            raise UserError("sparsities: there is no size to prune to; give e.g. sparsities: [0.2, 0.4, 0.6]")
        if any(not 0 < share < 1 for share in self.sparsities):
            raise UserError(f"sparsities: {list(self.sparsities)} must all lie between 0 and 1")
        for name in ("target_parameters", "max_length", "perplexity_words", "task_limit", "task_batch_size"):
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if value is not None and value < 1:
                    raise UserError(f"{name}: {value} must be at least 1")
        if len({Path(text).name for text in self.perplexity}) < len(self.perplexity):
            raise UserError("perplexity: two texts have the same file name; rename one")
        if self.control is not None and self.control not in self.variants:
            raise UserError(f"control: {self.control} is none of the variants {', '.join(self.variants)}")
        if ORIGINAL in self.variants:
            raise UserError(f"variants.{ORIGINAL}: the model before pruning has that name; give another")


@dataclass(frozen=True)
class Size:
    """What the variants are pruned to: a share or a number of parameters."""

    sparsity: float | None = None
    of: Literal["parameters", "channels"] = "parameters"
    parameters: int | None = None

    @property
    def label(self) -> str:
        """`40%`, `40% of channels`, `80000000 parameters`."""
        if self.sparsity is None:
            return f"{self.parameters} parameters"
        return f"{100 * self.sparsity:g}%" + (" of channels" if self.of == "channels" else "")


@dataclass(frozen=True)
class PruneArm:
    """One way of pruning."""

    name: str
    by_size: tuple[tuple[Size, Job], ...]
    """What is done for each size, without a seed. Where a size is a share of parameters, `sparsity` stands for it until
    the model is open and the share is a number of parameters."""

    @property
    def method(self) -> str:
        return self.by_size[0][1].method

    @property
    def pruning(self) -> PruneSettings:
        return self.by_size[0][1].pruning


@dataclass(frozen=True)
class PruneComparison:
    """A comparison with everything resolved."""

    settings: PruneCompareConfig
    sizes: tuple[Size, ...]
    arms: tuple[PruneArm, ...]
    control: str
    notes: tuple[str, ...] = field(default=())

    @property
    def folder(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def results_path(self) -> Path:
        return Path(self.settings.results) if self.settings.results else self.folder / "results.json"


def load_prune_comparison(path: str | Path, overrides: Sequence[str] = ()) -> PruneComparison:
    """Read and check a comparison of ways of pruning. Raises UserError with file, line and nearest key."""
    check_arms(path, overrides)
    settings: PruneCompareConfig = load_dataclass(path, PruneCompareConfig, overrides)
    refused = NOT_IN_PRUNE if settings.shrink is None else NOT_IN_SHRINK
    base = settings.shrink or settings.prune
    assert base is not None
    _refuse(base, "prune" if settings.shrink is None else "shrink", refused)
    sizes = (
        *(Size(sparsity=share, of=settings.sparsity_of) for share in settings.sparsities),
        *(Size(parameters=count) for count in settings.target_parameters),
    )
    job = _prune_job if settings.shrink is None else _shrink_job
    arms = []
    for name, node in settings.variants.items():
        if not is_null(node):
            _refuse(node, f"variants.{name}", refused)
        arms.append(PruneArm(name, tuple((size, job(base, node, size, settings)) for size in sizes)))
    notes = few_seeds_note(settings.seeds)
    if not settings.data:
        notes.append("importance was measured on the text that graftlm demo trains on: Python's own source files")
    uniform = [arm for arm in arms if is_uniform(arm.pruning)]
    if not uniform:
        one = "{method: llm-pruner}" if settings.shrink is None else "{prune: {method: llm-pruner}}"
        notes.append(f"no variant is uniform, which always has to be beaten; add one, such as uniform: {one}")
    control = next((arm for arm in uniform if arm.pruning.method == BASELINE), arms[0]).name
    control = settings.control or control
    return PruneComparison(settings, sizes, tuple(arms), control, tuple(notes))


def _prune_job(base: Node, changes: Node, size: Size, _: PruneCompareConfig) -> Job:
    aim: dict[str, Any] = {"target_parameters": size.parameters, "exact": True}
    if size.sparsity is not None:
        aim = {"sparsity": size.sparsity, "exact": size.of == "parameters"}
    return PruneJob(config_from_layers(base, changes, node_of(aim, COMMAND_LINE), kind=PruneSettings), size.of)


def _shrink_job(base: Node, changes: Node, size: Size, settings: PruneCompareConfig) -> Job:
    aim = {"sparsity": size.sparsity} if size.parameters is None else {"target_parameters": size.parameters}
    data = [dataclasses.asdict(source) for source in settings.data]
    layers = (base, changes, node_of({**aim, "model": settings.model, "data": data}, COMMAND_LINE))
    return ShrinkJob(make_shrink(config_from_layers(*layers, kind=ShrinkConfig)))


def _refuse(node: Node, name: str, refused: dict[str, str]) -> None:
    for key, why in refused.items():
        parent, _, leaf = key.rpartition(".")
        inside = take(node, parent)[0] if parent else None
        for where, name_there in ((node, key), (inside, leaf)):  # `train.seed: 1`, or seed within train
            if where is not None and take(where, name_there)[0] is not None:
                raise UserError(f"{place_of(where, name_there)}{name}.{key}: {why}")
