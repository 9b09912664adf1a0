"""What the methods with adapters share: PEFT's layers put into the model, and merged into its weights at the end.

PEFT (Apache-2.0) has the layers and their initialisations; here is only what a run needs around them. While a run goes
on, the model is the run's own object with some nn.Linear replaced, so trainer and checkpoints treat it as any other.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from graftlm.anatomy import decoder_linears, read_anatomy
from graftlm.errors import UserError
from graftlm.methods.adapter_settings import LoraSettings
from graftlm.methods.base import Method
from graftlm.parts import count_parameters
from graftlm.training.config import RunConfig

ADAPTER = "default"
"""PEFT's name of the one adapter that a model has here."""


def targets(model: PreTrainedModel, which: str) -> list[str]:
    """Paths of the nn.Linear that get an adapter: those of the decoder layers (`all`), of their FFNs (`ffn`), or the
    others (`attention`). Raises UserError where there are none."""
    linears = decoder_linears(model)
    if which != "all":
        blocks = read_anatomy(model).of_kind("channels")
        feed_forward = {matrix.module for block in blocks for matrix in block.mixed}
        linears = [name for name in linears if (name in feed_forward) == (which == "ffn")]
    if not linears:
        raise UserError(f"lora.target: {which} finds no linear layer in {type(model).__name__}; try all")
    return linears


class Adapters(Method):
    """LoRA and its kin. A subclass gives PEFT's config; one that learns from data overrides `look`."""

    per_rank: ClassVar[tuple[int, int]] = (1, 1)
    """Parameters of an adapter for each unit of rank: so many times in_features, and so many times out_features."""
    constant: ClassVar[int] = 0
    """Parameters of an adapter whatever its rank: so many times out_features."""
    begins_apart: ClassVar[bool] = False
    """Whether only what adapters begin as tells it from `lora`: the cost of a step is then lora's."""
    splits_weights: ClassVar[bool] = False
    """Whether adapters begin as a part of the weights, so that their rank is at most the weights' own."""

    def __init__(self, model: PreTrainedModel, config: RunConfig):
        super().__init__(model, config)
        self.settings: LoraSettings = config.lora
        self.targets = targets(model, self.settings.target)
        self.widths = [(m.in_features, m.out_features) for m in self.linears()]
        self.total = count_parameters(model)
        self.rank = self.settings.rank if self.settings.budget is None else self._rank_within(self.settings.budget)
        self.check_rank()
        self.peft: Any = None
        """PEFT's handle on the model (PeftModel); None before `prepare` and after `finish`."""
        self._trained_before: set[str] = set()
        self._tensor_parallel: Any = None

    # -- what a subclass says -----------------------------------------------------------------------------------------

    @property
    def alpha(self) -> float:
        """lora.alpha, or what the source has."""
        return self.rank if self.settings.alpha is None else self.settings.alpha

    def peft_config(self) -> Any:
        """PEFT's config, its targets left out."""
        return self.lora_config()

    def lora_config(self, **options: Any) -> Any:
        """A LoraConfig of these settings and `options`."""
        from peft import LoraConfig

        alpha: Any = self.alpha  # PEFT takes any number
        return LoraConfig(r=self.rank, lora_alpha=alpha, lora_dropout=self.settings.dropout, bias="none", **options)

    def check_rank(self) -> None:
        """Raise UserError for a rank that the method has no use for."""
        narrowest = min(min(widths) for widths in self.widths)
        if self.splits_weights and self.rank > narrowest:
            raise UserError(
                f"{self.rank_told} is above {narrowest}, the width of the narrowest layer that gets an adapter, which "
                f"method {self.config.method} cannot split so; lower it"
            )

    @property
    def rank_told(self) -> str:
        """The rank by the key that set it, to begin an error with."""
        if self.settings.budget is None:
            return f"lora.rank: {self.rank}"
        return f"lora.budget: {self.settings.budget:.4g} gives rank {self.rank}, which"

    # -- the contract -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        self._trained_before = {name for name, p in self.model.named_parameters() if p.requires_grad}
        self._tensor_parallel = getattr(self.model.config, "pretraining_tp", None)
        self.inject()

    def inject(self) -> None:
        """Put adapters into the bare model; only they train afterwards."""
        from peft import get_peft_model

        config = self.peft_config()
        config.target_modules = set(self.targets)
        with self.seeded(), warnings.catch_warnings():
            # By its old name, PEFT 0.21 asks whether activations are checkpointed (Trainer turns that on later).
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            self.peft = get_peft_model(self.model, config, adapter_name=ADAPTER)

    def finish(self) -> None:
        self.peft.merge_and_unload()
        self.peft = None
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in self._trained_before)
        if self._tensor_parallel is not None:  # which PEFT sets to 1
            self.model.config.pretraining_tp = self._tensor_parallel

    def resolved(self) -> RunConfig:
        settings = dataclasses.replace(self.settings, rank=self.rank, budget=None, alpha=None)
        method = "lora" if self.begins_apart else self.config.method
        return dataclasses.replace(self.config, method=method, lora=settings)  # type: ignore[arg-type]

    def readers(self, path: str) -> set[str]:
        return {path, f"{path}.base_layer", f"{path}.lora_A.{ADAPTER}"}

    @property
    def notes(self) -> list[str]:
        found = [f"adapters of rank {self.rank} on {len(self.targets)} linear layers"]
        if self.config.dtype != "float32":
            found.append("adapters are float32; merged, they are rounded to the weights' bfloat16")
        return found

    # -- for subclasses -----------------------------------------------------------------------------------------------

    @contextmanager
    def seeded(self, offset: int = 0) -> Iterator[None]:
        """Random numbers that depend on the run's seed alone, the same on every process and in a resumed run."""
        devices = list({p.device for p in self.model.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.config.seed + offset)
            yield

    def linears(self) -> list[nn.Linear]:
        """Of the bare model, those that get an adapter."""
        return [cast(nn.Linear, self.model.get_submodule(name)) for name in self.targets]

    def layers(self) -> dict[str, Any]:
        """PEFT's layers, by the path of the nn.Linear in whose place they are."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        return {name: m for name, m in self.model.named_modules() if isinstance(m, BaseTunerLayer)}

    def size(self, rank: int) -> int:
        """Parameters of all adapters of `rank`."""
        a, b = self.per_rank
        return sum(rank * (a * inputs + b * outputs) + self.constant * outputs for inputs, outputs in self.widths)

    def _rank_within(self, share: float) -> int:
        """The highest rank whose adapters are at most `share` of the model's parameters."""
        once = self.size(0)
        rank = int((share * self.total - once) // (self.size(1) - once))
        if rank < 1:
            raise UserError(
                f"lora.budget: {share:.4g} of {self.total:,} parameters is too little for rank 1, which takes "
                f"{self.size(1) / self.total:.4g}; raise it, or choose fewer layers with lora.target"
            )
        return rank
