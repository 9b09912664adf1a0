"""EVA: A begins as the leading right singular vectors of a layer's inputs, and ranks go to the layers whose inputs are
best explained.

Source: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv 2410.07170; PEFT's
initialisation (incremental PCA until the vectors stand still). alpha: 1 (the authors' script in PEFT). Ranks follow
from the data, so a checkpoint keeps them.
"""

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from graftlm.errors import UserError
from graftlm.fused_loss import IGNORED
from graftlm.methods.adapters import ADAPTER, Adapters
from graftlm.methods.base import Batches


class Eva(Adapters):
    begins_apart = True

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
                f"lora.rank: {self.rank} times lora.eva_rho: {self.settings.eva_rho:g} is above {narrowest}, the width "
                "of the narrowest input; lower one of them"
            )

    def look(self, batches: Batches) -> None:
        from peft import initialize_lora_eva_weights
        from peft.utils.incremental_pca import IncrementalPCA

        seen = list(batches(self.settings.samples))
        tokens = max((_counted(batch) for batch in seen), default=0)
        if tokens < self.most:
            raise UserError(
                f"lora.rank: {self.rank} times lora.eva_rho: {self.settings.eva_rho:g} needs that many tokens in a "
                f"batch, and there are at most {tokens}; lower one of them, or raise per_device_train_batch_size"
            )
        self._as_eva()
        # PEFT decomposes the inputs while the model runs.
        precise = torch.autocast(seen[0]["input_ids"].device.type, enabled=False)(IncrementalPCA.partial_fit)
        with self.seeded(), self.mixed(), patch.object(IncrementalPCA, "partial_fit", precise):
            initialize_lora_eva_weights(self.peft, seen, show_progress_bar=False)
        self._cast()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        from peft import initialize_lora_eva_weights

        inputs = {name: m.in_features for name, m in self.layers().items()}
        ranks = {name: int(state[f"rank.{name}"]) for name in inputs}
        # Values come with the checkpoint's weights; here the adapters get their shapes.
        empty = {f"base_model.model.{name}": torch.zeros(ranks[name], inputs[name]) for name in inputs}
        self._as_eva()
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
        return found


def _counted(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch that EVA looks at: those that count in the loss."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return int((mask & (batch["labels"] != IGNORED)).sum())
