"""What a training run is: one dataclass, in the words of TrainingArguments and TRL; ours live under `apex:`."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from graftlm.apex_config import ApexConfig
from graftlm.errors import UserError
from graftlm.methods.adapter_settings import LoraSettings, ReloraSettings
from graftlm.methods.sparse_settings import (
    HftSettings,
    IstSettings,
    LiftSettings,
    MaskSettings,
    ReweightingSettings,
    S2ftSettings,
)

SOURCE_KEYS = ("data", "eval_data", "selection_data")
"""Keys of a run that hold sources."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of training or evaluation data (an entry of data: or eval_data:)."""

    path: str
    """A file (.parquet; .txt, .md, .jsonl, .json, with .gz or .zst), a folder of such or of source files, or
    hub:OWNER/NAME."""
    weight: float | None = None
    """Share of the mixture's tokens, in proportion to the other sources' weights; an epoch ends with the first source
    used up, and the next goes on with what it left of the others (streaming: begins them again). None for every source:
    an epoch is all of each (streaming: equal shares)."""
    format: Literal["auto", "text", "messages", "prompt_completion", "alpaca", "sharegpt"] = "auto"
    """How a row is read. `auto` looks at the first row's columns."""
    text_field: str = "text"
    """Column that holds the text (format text)."""
    split: str = "train"
    """Split of a Hub dataset."""
    name: str | None = None
    """Configuration (subset) of a Hub dataset."""
    pattern: str = "**/*"
    """Which files of a folder are read (glob)."""
    limit: int | None = None
    """Read at most this many rows (documents); None reads all."""
    half: Literal["even", "odd"] | None = None
    """Read only the documents of even or of odd number (from 0), which have none in common; `limit` comes first."""

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise UserError(
                f"data.weight: {self.weight} of {self.path} must be above 0 and finite; leave the source out instead"
            )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"data.limit: {self.limit} of {self.path} must be at least 1")


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes, one a GPU, started by `torchrun -m graftlm train` or `accelerate launch -m graftlm train`."""

    strategy: Literal["none", "ddp", "fsdp2"] = "none"
    """none: one process. ddp: each process holds the whole model and optimizer. fsdp2: each holds its share of them
    (methods apex and full)."""


@dataclass(frozen=True)
class DistillationConfig:
    """Learning from another model's predictions beside the text (Minitron; Hinton et al. 2015), with any method."""

    teacher: str | None = None
    """The model to learn from, with the same vocabulary: anything that `model` may be; None: no distillation. It is
    held in memory beside the model, without gradients."""
    weight: float = 1.0
    """Share of the teacher in the loss: (1 - weight) cross-entropy + weight T^2 KL(teacher || model)."""
    temperature: float = 1.0
    """T: both models' logits are divided by it in the KL divergence."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the teacher's weights are held in."""

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise UserError(f"distillation.weight: {self.weight} must be above 0 and at most 1")
        if self.temperature <= 0:
            raise UserError(f"distillation.temperature: {self.temperature} must be above 0")


@dataclass(frozen=True)
class DynamicLoadingConfig:
    """Weights of the sources of data that follow their losses (Sheared-LLaMA's dynamic batch loading)."""

    every: int = 0
    """Steps between updates of the weights; 0: they stay as given."""
    reference_losses: tuple[float, ...] = ()
    """The loss that each source should come to, in nats per token, in the order of data; none: that of the model that
    training begins with (of a shrink: of the original), measured on the same sequences."""
    sequences: int = 32
    """Held-out sequences of each source, at most, that its loss is measured on."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(f"dynamic_loading.every: {self.every} must not be negative")
        if self.sequences < 1:
            raise UserError(f"dynamic_loading.sequences: {self.sequences} must be at least 1")


@dataclass(frozen=True)
class RunConfig:
    """A training run (`graftlm train CONFIG.yaml`)."""

    model: str
    """A folder, a Hub id, a .gguf file, or built-in: `smollm2` (SmolLM2-135M-Instruct as a 4-bit file, unpacked), or
    `tiny-llama` (a small random Llama built from its config, for tests and newcomers)."""
    data: tuple[SourceConfig, ...]
    """Training data: a path, a list of paths, or a list of sources with weights."""
    output_dir: str = "runs/train"
    """The run folder."""
    method: Literal[
        "apex", "full", "lora", "dora", "rslora", "pissa", "olora", "eva", "lora_ga", "miss", "relora",
        "s2ft", "hft", "gmt", "rmt", "lift", "ist",
    ] = "apex"  # fmt: skip
    """apex; full: plain training of everything; or another way to compare with (docs/methods.md)."""
    control: bool = False
    """After the run, train the same model plainly on the same tokens, order, schedule and seed, and report both."""
    apex: ApexConfig = field(default_factory=ApexConfig)
    """Settings of APEX."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Settings of the methods with adapters."""
    relora: ReloraSettings = field(default_factory=ReloraSettings)
    """Settings of ReLoRA, beside `lora`."""
    s2ft: S2ftSettings = field(default_factory=S2ftSettings)
    """Settings of S2FT."""
    hft: HftSettings = field(default_factory=HftSettings)
    """Settings of HFT."""
    gradient_mask: MaskSettings = field(default_factory=MaskSettings)
    """Settings of GMT and RMT."""
    lift: LiftSettings = field(default_factory=LiftSettings)
    """Settings of LIFT."""
    ist: IstSettings = field(default_factory=IstSettings)
    """Settings of IST, beside `lora`."""
    reweighting: ReweightingSettings = field(default_factory=ReweightingSettings)
    """Weights of samples by their loss, with any method."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """Learning from a teacher's predictions, with any method."""
    dynamic_loading: DynamicLoadingConfig = field(default_factory=DynamicLoadingConfig)
    """More of the sources whose loss is far from where it should be, with any method."""
    stage_starts: tuple[int, ...] = ()
    """Method full: steps at which the learning rate follows apex' stages; a control gets those of its run."""

    eval_data: tuple[SourceConfig, ...] = ()
    """Held-out data; empty holds back eval_fraction of the training documents."""
    eval_fraction: float = 0.02
    """Share of the training documents held back when eval_data is empty; 0 evaluates nothing."""
    eval_max_blocks: int = 64
    """At most this many sequences are evaluated each time."""
    selection_data: tuple[SourceConfig, ...] = ()
    """Held-out data apart from eval_data, evaluated once, at the end: what a learning rate or method may be chosen on
    without looking at the loss that is reported."""

    task: Literal["auto", "cpt", "sft"] = "auto"
    """cpt trains on every token of text; sft on the assistant's tokens of conversations. auto: by the data's format."""
    max_length: int = 1024
    """Tokens a sequence (block)."""
    packing: bool = True
    """cpt: fill blocks with consecutive documents. sft: several conversations a block, kept apart by position_ids.
    False pads."""
    document_boundaries: bool = False
    """cpt with packing: keep documents of one block apart too (attention does not cross them). sft always does."""
    assistant_only_loss: bool = True
    """sft: only the assistant's tokens count in the loss. False: every token does."""
    truncation: Literal["truncate", "drop", "split"] = "truncate"
    """sft: what happens to conversations longer than max_length. truncate cuts the rest off, drop leaves them out (the
    share is printed), split lets the rest go on in further sequences."""
    chat_template: str | None = None
    """A Jinja file, or a known template's name (chatml), for models without one."""
    streaming: bool = False
    """Tokenise while training and keep no cache: for data that is read once or never ends (needs max_steps)."""
    cache_dir: str | None = None
    """Where tokenised data is kept; None: ~/.cache/graftlm (or $GRAFTLM_CACHE)."""

    learning_rate: float = 2e-5
    """Peak learning rate."""
    lr_scheduler_type: str = "cosine"
    """Any of transformers' schedules that follow the step: linear, cosine, constant, constant_with_warmup,
    cosine_with_min_lr, warmup_stable_decay ..."""
    lr_scheduler_kwargs: dict[str, float | Literal["linear", "cosine", "1-sqrt"]] | None = None
    """Extra arguments of the schedule, e.g. {min_lr_rate: 0.1}, or {decay_type: linear} of warmup_stable_decay."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate climbs from 0."""
    per_device_train_batch_size: int = 8
    """Sequences a device and forward pass."""
    per_device_eval_batch_size: int = 8
    """Sequences a device and evaluation pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes an optimizer step."""
    num_train_epochs: float = 1.0
    """Passes over the data, unless max_steps is given."""
    max_steps: int = -1
    """Optimizer steps; -1: by epochs."""
    phase: tuple[int, ...] | None = None
    """[first, end]: of max_steps steps take only those from `first` (0 is the first of all) to before `end`, at the
    whole run's learning rates and place in the data. `graftlm shrink` sets it; a phase that begins later goes on from a
    checkpoint that shrink puts there."""
    weight_decay: float = 0.0
    """AdamW's weight decay; never on operators, norms or biases."""
    adam_beta1: float = 0.9
    """AdamW's first beta."""
    adam_beta2: float = 0.95
    """AdamW's second beta."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: not."""
    optim: str = "adamw_torch"
    """Any of transformers' optimizers but GaLore, APOLLO and torchao's; some need a library of their own."""
    bf16: bool = False
    """bfloat16 autocast; weights and optimizer stay float32."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the weights are held in."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    torch_compile: bool = False
    """Compile the model with torch.compile."""
    fused_loss: bool | Literal["auto"] = "auto"
    """Take the loss some tokens at a time, so that the logits of a batch never exist whole: less memory, same time.
    auto: unless the model is compiled, or of a family whose logits may be more than the LM head's product, or samples
    are reweighted."""
    use_liger_kernel: bool = False
    """liger-kernel's RoPE, RMSNorm and (unless fused_loss is false) its fused loss; needs an NVIDIA or AMD GPU."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """More than one GPU."""
    attn_implementation: str | None = None
    """sdpa, eager, flash_attention_2 ...; None lets transformers choose."""
    trust_remote_code: bool = False
    """Run code that comes with a Hub model. Off unless asked for."""

    logging_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_steps: int = 0
    """Steps between evaluations; 0: at the start, at stage boundaries and at the end only."""
    save_steps: int = 0
    """Steps between checkpoints; 0: at stage boundaries and at the end only."""
    save_total_limit: int = 2
    """How many checkpoints are kept; 0: none is written, and a killed run begins anew."""
    report_to: tuple[str, ...] = ()
    """tensorboard, trackio, wandb; metrics.jsonl is written anyway."""
    seed: int = 0
    """Seed of data order and everything drawn at random."""

    @property
    def opened_with(self) -> dict[str, Any]:
        """How the model is opened: arguments of models.load_model and load_skeleton."""
        return {
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }

    @property
    def sequences_per_step(self) -> int:
        """Of one process, in an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def state_moves(self) -> bool:
        """Whether entries of the optimizer's state can go along with those of the weights: not in 8 bits, nor paged."""
        return "8bit" not in self.optim and "paged" not in self.optim

    @property
    def flash_over_float32(self) -> bool:
        """Flash attention, which computes in 16 bits only, of a model in float32: it runs under autocast alone."""
        return "flash" in (self.attn_implementation or "") and self.dtype == "float32"

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("data: no source given; name a file, a folder, or hub:OWNER/NAME")
        for key in ("data", "eval_data", "selection_data"):
            sources = getattr(self, key)
            if len({source.weight is None for source in sources}) > 1:
                raise UserError(f"{key}: some sources have a weight and some have none; give it to all, or to none")
        positive = (
            "max_length",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "eval_max_blocks",
            "learning_rate",
            "num_train_epochs",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(f"{name}: {getattr(self, name)} must be above 0")
        if self.max_length == 1:
            raise UserError("max_length: 1 leaves nothing to predict; give at least 2")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed: {self.seed} must be from 0 to {2**32 - 1}")
        for name in ("warmup_ratio", "eval_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} must be in [0, 1)")
        for name in ("weight_decay", "max_grad_norm", "eval_steps", "save_steps", "save_total_limit"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: {getattr(self, name)} must not be negative")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"max_steps: {self.max_steps} must be above 0, or -1 to train by epochs")
        if self.phase is not None and (
            len(self.phase) != 2 or not 0 <= self.phase[0] < self.phase[1] <= self.max_steps
        ):
            raise UserError(f"phase: {list(self.phase)} must be [first, end] with 0 <= first < end <= max_steps")
        if self.phase is not None and self.method not in ("apex", "full"):
            raise UserError(f"phase: {self.method} keeps state that no phase can begin with; use method apex or full")
        if self.phase is not None and self.apex.stage_by == "epochs" and self.method == "apex":
            raise UserError("apex.stage_by: a phase is shorter than an epoch may be; use steps or tokens")
        if self.flash_over_float32 and not self.bf16:
            raise UserError(
                f"attn_implementation: {self.attn_implementation} computes in 16 bits only; set bf16: true, or use sdpa"
            )
        if self.distillation.teacher is not None:
            self._check_distillation()
        if self.dynamic_loading.every:
            self._check_dynamic_loading()
        if self.distributed.strategy == "fsdp2" and self.method not in ("apex", "full"):
            raise UserError(f"distributed.strategy: fsdp2 cannot shard method: {self.method}; use ddp or none")
        if self.streaming and self.max_steps < 0:
            raise UserError("max_steps: streaming data has no known length; set max_steps")
        if self.streaming and self.apex.stage_by == "epochs" and self.method == "apex":
            raise UserError("apex.stage_by: streaming data has no epochs; use steps or tokens")

    def _check_dynamic_loading(self) -> None:
        told, sources = self.dynamic_loading.reference_losses, len(self.data)
        if sources < 2:
            raise UserError(
                "dynamic_loading: data has one source, and weights are of several; give more, or leave it out"
            )
        if told and len(told) != sources:
            raise UserError(f"dynamic_loading.reference_losses: has {len(told)} losses for {sources} sources of data")
        if self.eval_data and len(self.eval_data) != sources:
            raise UserError(
                f"eval_data: has {len(self.eval_data)} sources; dynamic_loading needs one for each of data's "
                f"{sources}, in their order (or none: some of each is held back)"
            )
        if not self.eval_data and not self.eval_fraction:
            raise UserError(
                "eval_fraction: dynamic_loading measures losses on held-out text; give eval_data, or above 0"
            )
        if self.streaming or self.max_steps < 0:
            name = "streaming" if self.streaming else "num_train_epochs"
            raise UserError(f"{name}: does not go with dynamic_loading, which has no epochs; set max_steps alone")
        if self.control:
            raise UserError("control: would see other data than the run under dynamic_loading; leave out one of them")

    def _check_distillation(self) -> None:
        """Its loss is the fused one, which sees the last hidden states and not the logits."""
        taken = {
            "fused_loss": self.fused_loss is False,
            "use_liger_kernel": self.use_liger_kernel,
            "torch_compile": self.torch_compile,
            "reweighting": self.reweighting.strategy != "none",
            "distributed.strategy": self.distributed.strategy == "fsdp2",
        }
        for name, there in taken.items():
            if there:
                raise UserError(f"{name}: does not go with distillation.teacher; leave out one of them")
