"""LoRA-GA: A and B begin as singular vectors of the gradient: their first step goes where full fine-tuning's does.

Source: Wang, Yu and Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024, arXiv 2407.05000;
PEFT's initialisation, after which W keeps the rest. alpha: twice the rank (16 at rank 8, as in PEFT's example). PEFT
departs from the authors' code: there B A is scaled by alpha / sqrt(r), and with the scale `stable` the singular vectors
in A and in B are both multiplied by out_features^(1/4) / gamma^(1/2); PEFT multiplies those in B alone, and by their
singular values besides.
"""

import warnings
from typing import Any

import torch
import torch.distributed as dist

from graftlm.errors import UserError
from graftlm.methods.adapters import Adapters
from graftlm.methods.base import Batches


class LoraGa(Adapters):
    begins_apart = splits_weights = True

    @property
    def alpha(self) -> float:
        return 2 * self.rank if self.settings.alpha is None else self.settings.alpha

    def check_rank(self) -> None:
        narrowest = min(min(widths) for widths in self.widths)
        if 2 * self.rank > narrowest:
            raise UserError(
                f"{self.rank_told} is above {narrowest // 2}: lora_ga takes twice the rank of singular vectors, and "
                f"the narrowest layer has {narrowest}; lower it"
            )

    def peft_config(self) -> Any:
        from peft import LoraGAConfig

        settings = self.settings
        given = LoraGAConfig(
            direction=settings.lora_ga_direction,
            scale=settings.lora_ga_scale,
            stable_gamma=settings.lora_ga_gamma,
        )
        # Where no gradient has been seen (in prepare), PEFT begins as plain LoRA does.
        return self.lora_config(init_lora_weights="lora_ga", lora_ga_config=given)

    def look(self, batches: Batches) -> None:
        from peft import preprocess_loraga

        self.peft.unload()  # PEFT estimates gradients on the bare model
        config = self.peft_config()
        config.target_modules = set(self.targets)

        def train_step() -> None:
            for batch in batches(self.settings.samples):
                with self.mixed():
                    loss = self.model(**batch, use_cache=False).loss
                loss.backward()
            self._average()

        with self.seeded(), warnings.catch_warnings():
            # Nothing before the first layer needs a gradient, which hooks on it remark on.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            preprocess_loraga(self.model, config, train_step)
        self.inject()

    def looks(self) -> tuple[int, bool]:
        return self.settings.samples, True

    def _average(self) -> None:
        """Gradients of all processes, which have seen different sequences."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        for name in self.targets:
            gradient = self.model.get_submodule(name).weight.grad
            assert isinstance(gradient, torch.Tensor)
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
