"""EVA: A begins as the leading right singular vectors of a layer's inputs, and ranks go to the layers whose inputs are
best explained.

Source: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv 2410.07170; PEFT's
initialisation (incremental PCA until the vectors stand still). alpha: 1 (the authors' script in PEFT). Ranks follow
from the data, so a checkpoint keeps them. They may move to wider layers; where adapters would be more than
`lora.budget` then, the vectors that explain least are left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from graftlm.errors import UserError
from graftlm.methods.adapters import ADAPTER, Adapters
from graftlm.methods.base import Batches
from graftlm.samples import IGNORED

PREFIX = "base_model.model."
"""Before a layer's name in PEFT's state."""
LOOKS = 2000
"""Batches looked at, the same ones again and again, until the vectors must stand still (or ten times all of them, if
that is more): two batches of a tiny model took 250 for a cosine of 0.99. One that rounding keeps out of reach, or NaN,
would take for ever."""


class Eva(Adapters):
    begins_apart = True
    left_out = 0
    """Vectors that explain least, left out to stay within lora.budget."""

    @property
    def alpha(self) -> float:
        return 1.0 if self.settings.alpha is None else self.settings.alpha

    @property
    def most(self) -> int:
        """Highest rank that a layer may get."""
        return round(self.rank * self.settings.eva_rho)

    def check_rank(self) -> None:
        narrowest = min(inputs for inputs, _ in self.widths)
        if self.most > narrowest:
            raise UserError(
                f"{self.rank_told} times lora.eva_rho: {self.settings.eva_rho:g} is above {narrowest}, the width of "
                "the narrowest input; lower one of them"
            )

    def look(self, batches: Batches) -> None:
        from peft import get_eva_state_dict, initialize_lora_eva_weights
        from peft.utils.incremental_pca import IncrementalPCA

        seen = list(batches(self.settings.samples))
        tokens = max((_counted(batch) for batch in seen), default=0)
        if tokens < self.most:
            raise UserError(
                f"{self.rank_told} times lora.eva_rho: {self.settings.eva_rho:g} needs that many tokens in a batch, "
                f"and there are at most {tokens}; lower one of them, or raise per_device_train_batch_size"
            )
        self._as_eva()
        forwards, fitted = 0, {}

        def forward(model: Any, batch: Mapping[str, Tensor]) -> None:
            nonlocal forwards
            if forwards >= (most := max(LOOKS, 10 * len(seen))):
                raise UserError(
                    f"lora.eva_tau: singular vectors are not as still as {self.settings.eva_tau:g} after {most:,} "
                    f"looks at the batches of lora.samples: {self.settings.samples}; lower it, or raise lora.samples"
                )
            forwards += 1
            model(**batch)

        # PEFT decomposes the inputs while the model runs.
        @torch.autocast(seen[0]["input_ids"].device.type, enabled=False)
        def partial_fit(pca: Any, *args: Any, **options: Any) -> Any:
            fitted[id(pca)] = pca
            return original(pca, *args, **options)

        original = IncrementalPCA.partial_fit
        with self.seeded():
            with self.mixed(), patch.object(IncrementalPCA, "partial_fit", partial_fit):
                found = get_eva_state_dict(self.peft, seen, forward_fn=forward, show_progress_bar=False)
            if self.settings.budget is not None:
                self._keep_within(self.settings.budget * self.total, found, list(fitted.values()))
            initialize_lora_eva_weights(self.peft, eva_state_dict=found)
        self._cast()

    def _keep_within(self, limit: float, found: dict[str, Tensor], fitted: Sequence[Any]) -> None:
        """Shorten `found`, singular vectors [rank, in_features] of each layer by PEFT's name, until the adapters have
        at most `limit` parameters: PEFT's own choice of ranks, of fewer of them.

        fitted: the decompositions; layers with the same inputs share one.
        """
        costs = {PREFIX + name: sum(widths) for name, widths in zip(self.targets, self.widths, strict=True)}
        explained: list[tuple[float, int, str]] = []
        for name, vectors in found.items():
            if len(vectors):
                pca = next(p for p in fitted if torch.equal(p.components_[: len(vectors)].to(vectors), vectors))
                shares = pca.explained_variance_ratio_[: len(vectors)].tolist()
                explained += [(share, -i, name) for i, share in enumerate(shares)]
        excess = sum(len(vectors) * costs[name] for name, vectors in found.items()) - limit
        for _, _, name in sorted(explained):  # of a layer's, the last ones first
            if excess <= 0:
                break
            found[name] = found[name][:-1]
            excess -= costs[name]
            self.left_out += 1

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        from peft import initialize_lora_eva_weights

        inputs = {name: m.in_features for name, m in self.layers().items()}
        ranks = {name: int(state[f"rank.{name}"]) for name in inputs}
        # Values come with the checkpoint's weights; here the adapters get their shapes.
        empty = {PREFIX + name: torch.zeros(ranks[name], inputs[name]) for name in inputs}
        self._as_eva()
        self.left_out = self.rank * len(ranks) - sum(ranks.values())
        with self.seeded():
            initialize_lora_eva_weights(self.peft, eva_state_dict=empty)
        self._cast()

    def state_dict(self) -> dict[str, Tensor]:
        layers = self.layers()
        ranks = {name: layers[name].r[ADAPTER] if name in layers else 0 for name in self.targets}
        return {f"rank.{name}": torch.tensor(rank) for name, rank in ranks.items()}

    def looks(self) -> None:
        """The PCA goes on until its vectors stand still."""

    def _as_eva(self) -> None:
        """Tell PEFT that these adapters wait for EVA; from the beginning, it would warn about memory."""
        from peft import EvaConfig

        config: Any = self.peft.peft_config[ADAPTER]
        config.init_lora_weights = "eva"
        config.eva_config = EvaConfig(rho=self.settings.eva_rho, tau=self.settings.eva_tau)

    def _cast(self) -> None:
        """Adapters whose rank has changed are in the weights' dtype: into float32, as PEFT has them at first."""
        self.peft.base_model._cast_adapter_dtype(ADAPTER, autocast_adapter_dtype=True)

    @property
    def notes(self) -> list[str]:
        found = super().notes
        if self.settings.eva_rho > 1:
            found.append("ranks, and with them the number of trainable parameters, follow from the data")
        if self.left_out:
            found.append(
                f"{self.left_out} of {self.rank * len(self.targets)} singular vectors, those that explain least, are "
                "left out to stay within lora.budget"
            )
        return found


def _counted(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch that EVA looks at: those that count in the loss."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return int((mask & (batch["labels"] != IGNORED)).sum())
