"""IST: in every step only some layers' adapters train, the more important layers more often.

Source: Yao et al., "Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient
Fine-tuning of Large Language Models", EMNLP 2024 Findings, arXiv 2410.11772, and facts of its published code. It goes
with any adapters a layer; here those are LoRA's (`lora:`), as in its main results. In every step, `active` of the
layers are drawn without replacement, in proportion to sigmoid(s) of their importance s, and only their adapters have
gradients. Every `interval` steps a few sets of layers are drawn, in proportion to sigmoid(-s); the adapters of each
set are scaled down (response suppression), and the loss on some training sequences gives its reward, exp(-loss). Where
suppressing a layer does good (a reward above the sets' mean), its importance falls, elsewhere it rises, by
rate * (reward - mean) * p (1 - p) with p = sigmoid(s): a policy-gradient step. s begins at zero.

As in the code: layers are drawn anew in every step, the optimizer's state of a layer waits until it trains again.
Departs from it in that the sequences of a trial are the same ones all along (there: other ones each time), so that a
resumed run needs no second data loader; and numbers are drawn from the run's seed and the step.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftlm.anatomy import decoder_layers
from graftlm.methods.adapters import ADAPTER
from graftlm.methods.base import Batches
from graftlm.methods.lora import Lora
from graftlm.methods.sparse_settings import IstSettings
from graftlm.modes import evaluating
from graftlm.training.config import RunConfig

TRIALS, LAYERS = range(2)
"""Streams of random numbers."""


class Ist(Lora):
    strategies = ("none",)  # DDP settles what it averages once, when a run begins

    def __init__(self, model: PreTrainedModel, config: RunConfig):
        super().__init__(model, config)
        self.ist: IstSettings = config.ist
        path, layers = decoder_layers(model)
        self.path, self.count = path, len(layers)
        self.importance = torch.zeros(self.count, dtype=torch.float64)
        self.active: list[int] = []
        """Layers that train in the step that comes."""
        self._step = 0
        self._seen: list[dict[str, Tensor]] = []

    # -- the contract -------------------------------------------------------------------------------------------------

    def look(self, batches: Batches) -> None:
        self._seen = [{key: value.cpu() for key, value in batch.items()} for batch in batches(self.ist.samples)]

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.importance, self._step = state["importance"].clone(), int(state["step"])
        seen: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            if kind == "seen":
                number, _, key = rest.partition(".")
                seen.setdefault(int(number), {})[key] = value
        self._seen = [seen[number] for number in sorted(seen)]

    def state_dict(self) -> dict[str, Tensor]:
        seen = {f"seen.{i}.{key}": value for i, batch in enumerate(self._seen) for key, value in batch.items()}
        return {"importance": self.importance, "step": torch.tensor(self._step), **seen}

    def start(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        self._draw_active()

    def after_step(self, step: int) -> None:
        self._step = step
        if step % self.ist.interval == 0 and self._seen:
            self._estimate()
        self._draw_active()

    def looks(self) -> tuple[int, bool]:
        return 0, False  # sequences are kept for later

    @property
    def trainable(self) -> int:
        """In a step."""
        by_layer = self.size(self.rank) // self.count
        return by_layer * self._number(self.ist.active)

    @property
    def notes(self) -> list[str]:
        shown = ", ".join(f"{value:.2f}" for value in self.importance.sigmoid().tolist())
        found = f"{self._number(self.ist.active)} of {self.count} layers train in a step; importance by layer: {shown}"
        return [*super().notes, found]

    # -- layers -------------------------------------------------------------------------------------------------------

    def _number(self, share: float) -> int:
        return max(1, int(share * self.count))

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.config.seed * 1_000_003 + self._step) * 2 + stream)

    def _adapters(self) -> list[tuple[int, Any]]:
        """PEFT's layers, each with the number of the decoder layer that it is in."""
        return [(int(name.removeprefix(f"{self.path}.").partition(".")[0]), m) for name, m in self._found()]

    def _found(self) -> list[tuple[str, Any]]:
        return [(name, module) for name, module in self.layers().items() if name.startswith(f"{self.path}.")]

    def _draw_active(self) -> None:
        drawn = self.importance.sigmoid().multinomial(self._number(self.ist.active), generator=self._generator(LAYERS))
        self.active = sorted(drawn.tolist())
        for number, layer in self._adapters():
            for parameter in _parameters(layer):
                parameter.requires_grad_(number in self.active)
                if number not in self.active:
                    parameter.grad = None

    # -- importance ---------------------------------------------------------------------------------------------------

    def _estimate(self) -> None:
        """A step of the importance."""
        sets = self._sets()
        rewards = torch.tensor([math.exp(-self._loss_without(layers)) for layers in sets], dtype=torch.float64)
        probability = self.importance.sigmoid()
        for layers, gain in zip(sets, (rewards - rewards.mean()).tolist(), strict=True):
            slope = probability[layers] * (1 - probability[layers])
            self.importance[layers] -= self.ist.rate * gain * slope

    def _sets(self) -> list[list[int]]:
        """Different sets of layers, the less important ones more often; no more than there are."""
        size, generator = self._number(self.ist.suppressed), self._generator(TRIALS)
        sets: list[list[int]] = []
        while len(sets) < min(self.ist.trials, math.comb(self.count, size)):
            layers = sorted((-self.importance).sigmoid().multinomial(size, generator=generator).tolist())
            if layers not in sets:
                sets.append(layers)
        return sets

    @torch.no_grad()
    def _loss_without(self, suppressed: list[int]) -> float:
        """Mean loss on the trial's sequences, with those layers' adapters scaled down."""
        model, device = self.model, next(self.model.parameters()).device
        changed = [(layer, layer.scaling[ADAPTER]) for number, layer in self._adapters() if number in suppressed]
        for layer, scaling in changed:
            layer.scaling[ADAPTER] = scaling * self.ist.suppression
        total, rows = 0.0, 0
        with evaluating(model):
            for batch in self._seen:
                inputs = {key: value.to(device) for key, value in batch.items()}
                total += float(model(**inputs, use_cache=False).loss) * len(inputs["input_ids"])
                rows += len(inputs["input_ids"])
        for layer, scaling in changed:
            layer.scaling[ADAPTER] = scaling
        return total / rows


def _parameters(layer: Any) -> list[nn.Parameter]:
    """Those of one adapter."""
    return [p for name in ("lora_A", "lora_B") for p in getattr(layer, name).parameters()]
