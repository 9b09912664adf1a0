"""MiSS (formerly Bone): one small matrix is added to every block of r input columns of a weight.

Source: Kang and Yin, "Balancing LoRA Performance and Efficiency with Simple Shard Sharing", arXiv 2409.15371; PEFT's
layers. It has no alpha, and `rank` times out_features parameters a layer, about half of LoRA's.
"""

from typing import Any

from graftlm.errors import UserError
from graftlm.methods.adapters import Adapters


class Miss(Adapters):
    per_rank = (0, 1)

    def peft_config(self) -> Any:
        from peft import MissConfig

        return MissConfig(r=self.rank, miss_dropout=self.settings.dropout, bias="none")

    def prepare(self) -> None:
        if self.settings.alpha is not None:
            raise UserError("lora.alpha: method miss has none; leave it out")
        super().prepare()

    def check_rank(self) -> None:
        narrowest = min(inputs for inputs, _ in self.widths)
        if self.rank > narrowest:
            raise UserError(f"{self.rank_told} is above {narrowest}, the width of the narrowest input; lower it")

    def products(self) -> dict[str, tuple[int, bool]]:
        return {name: (self.rank * outputs, True) for name, (_, outputs) in zip(self.targets, self.widths, strict=True)}
