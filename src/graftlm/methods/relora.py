"""ReLoRA: LoRA merged into the weights and begun anew every so often, so that the sum of updates has a higher rank.

Source: Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", ICLR 2024, arXiv 2307.05695. At a merge A
is drawn anew and B is zero, most of the optimizer's state of both is set to zero, and the learning rate climbs again
(jagged schedule). alpha: the rank, as for lora. Departs from the published code in setting the same entries of Adam's
two moments to zero, those with the smallest first moment (it prunes each by its own magnitude), and from the paper in
training adapters only, as the APEX paper's comparison does: embeddings, norms and LM head stay as they are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftlm.errors import UserError
from graftlm.methods.adapter_settings import ReloraSettings
from graftlm.methods.adapters import ADAPTER, Adapters
from graftlm.moments import moments_of
from graftlm.training.config import RunConfig


class ReLora(Adapters):
    def __init__(self, model: PreTrainedModel, config: RunConfig):
        super().__init__(model, config)
        self.relora: ReloraSettings = config.relora
        self.merges: list[int] = []
        """Optimizer steps (from 1) after which adapters are merged."""
        self.warm = 0
        """Steps of the warm start."""
        self.warmup = 0
        self._optimizer: Any = None
        self._step = 0
        self._schedule_note: str | None = None
        """When merges happen; known once the run has begun."""

    def prepare(self) -> None:
        relora, config = self.relora, self.config
        if relora.warm_start and config.distributed.strategy == "ddp":
            raise UserError(
                "relora.warm_start: ddp cannot change what trains in the middle of a run; train plainly first (method: "
                "full), and give the model of that run"
            )
        if 0 < relora.prune < 1 and ("8bit" in config.optim or config.optim == "adafactor"):
            kind = "a factored state" if config.optim == "adafactor" else "a state in 8 bits"
            raise UserError(
                f"relora.prune: {relora.prune:g} of {kind} cannot be set to zero; set it to 1 or 0, or use "
                "optim: adamw_torch"
            )
        super().prepare()
        if relora.warm_start:
            for name, p in self.model.named_parameters():
                p.requires_grad_(p.requires_grad or _bare(name) in self._trained_before)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._step = int(state["step"])

    def state_dict(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self._step)}

    def check_steps(self, total_steps: int) -> None:
        relora = self.relora
        if relora.warm_start >= total_steps:
            raise UserError(
                f"relora.warm_start: {relora.warm_start:g} of the run's {total_steps} steps leave none to adapters; "
                "lower it, or choose method: full"
            )
        warmup, interval = (_exact(given, total_steps) for given in (relora.warmup, relora.interval))
        if warmup - max(1, interval) >= 1:  # less is rounding
            raise UserError(
                f"relora.warmup: {warmup:g} of the run's {total_steps} steps are more than the {interval:g} between "
                "merges (relora.interval), and the learning rate would never be reached; lower it"
            )

    def start(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        self._optimizer = optimizer
        relora = self.relora
        self.warm = min(_steps(relora.warm_start, total_steps), total_steps - 1)  # less than all of it, once rounded
        interval = max(1, _steps(relora.interval, total_steps))
        self.warmup = min(_steps(relora.warmup, total_steps), interval)  # a pilot's may have been rounded up
        # Not after the last step: adapters are merged then anyway.
        self.merges = list(range(self.warm + interval, total_steps, interval))
        self._schedule_note = _schedule(self.merges, interval, total_steps)
        if relora.warm_start:  # which may round to no step
            self._train_everything(self._step < self.warm)

    def rate_factor(self, step: int) -> float:
        begun = max(
            (merge for merge in ([self.warm] if self.warm else []) + self.merges if merge <= step), default=None
        )
        if begun is None or not self.warmup:
            return 1.0
        return min(1.0, (step - begun + 1) / self.warmup)

    def after_step(self, step: int) -> None:
        self._step = step
        if step == self.warm:
            self._train_everything(False)
        elif step in self.merges:
            self.merge(step)

    @torch.no_grad()
    def merge(self, step: int) -> None:
        """Add the adapters to the weights and begin new ones."""
        with self.seeded(offset=step):
            for layer in self.layers().values():
                layer.merge(adapter_names=[ADAPTER])
                layer.merged_adapters.clear()  # what follows is another adapter, which is not merged
                layer.reset_lora_parameters(ADAPTER, True)
                for module in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
                    self._forget(module.weight)

    def _forget(self, parameter: nn.Parameter) -> None:
        """Set `relora.prune` of the optimizer's state of one parameter to zero; all of it: as if it had never
        stepped. The same entries of all moments: a first moment without its second one is a step without bound, since A
        has no gradient as long as B is zero."""
        share = self.relora.prune
        if share == 1:
            self._optimizer.state.pop(parameter, None)
        state = self._optimizer.state.get(parameter, {}) if share else {}
        moments = [moment.view(-1) for moment in moments_of(state, parameter)]
        if moments:
            score = moments[0].abs() if self.relora.prune_by == "magnitude" else torch.rand_like(moments[0])
            gone = score.topk(round(share * score.numel()), largest=False).indices
            for moment in moments:
                moment[gone] = 0

    def _train_everything(self, everything: bool) -> None:
        """The warm start trains the model's own weights, and all after it the adapters."""
        mine = {id(p) for layer in self.layers().values() for n in ("lora_A", "lora_B")
                for p in getattr(layer, n).parameters()}  # fmt: skip
        for name, p in self.model.named_parameters():
            if id(p) in mine:
                p.requires_grad_(not everything)
            elif _bare(name) in self._trained_before:
                p.requires_grad_(everything)
                if not everything:
                    p.grad = None
                    self._optimizer.state.pop(p, None)

    @property
    def trainable(self) -> int:
        """Of the adapters; a warm start trains all weights for a while."""
        return self.size(self.rank)

    @property
    def notes(self) -> list[str]:
        found = super().notes
        if self.relora.warm_start:
            found.append("a warm start trains all weights first, and needs their gradients and optimizer state")
        if self._schedule_note is not None:
            found.append(self._schedule_note)
        return found


def _exact(given: float, total: int) -> float:
    """Steps; below 1: a share of `total`."""
    return given * total if given < 1 else given


def _steps(given: float, total: int) -> int:
    return round(_exact(given, total))


def _schedule(merges: list[int], interval: int, total: int) -> str:
    """A note on when adapters are merged in a run of `total` steps."""
    if not merges:
        return f"no merge before the end of the run's {total} steps: adapters train as lora's do (relora.interval)"
    if len(merges) == 1:
        return f"adapters are merged after step {merges[0]}, and at the end"
    return f"adapters are merged {len(merges)} times, after every {interval} steps from {merges[0]} on, and at the end"


def _bare(name: str) -> str:
    """A parameter's name without adapters in the model."""
    return name.replace(".base_layer.", ".")
