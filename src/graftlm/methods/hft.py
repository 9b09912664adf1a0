"""HFT: half of the matrices of every kind train, another half in every round; embeddings and LM head always do.

Source: Hui et al., "HFT: Half Fine-Tuning for Large Language Models", ACL 2025, arXiv 2404.18466, its category-level
choice: in every layer half of the attention's matrices, half of the FFN's and half of the norms, drawn at random; 52%
of LLaMA2-7B with embeddings and LM head, as in the APEX paper's table 1. Of an odd number (gate, up, down) half of the
layers train one more than the others. A bias goes with its matrix; the last norm always trains. A round is an epoch
(`hft.round_steps`). The paper does not say what becomes of the optimizer's state: here that of a matrix is forgotten
when it is frozen, which frees its memory, and kept where it goes on training. What is frozen has no gradient at all.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftlm.anatomy import decoder_layers
from graftlm.methods.base import Method
from graftlm.methods.sparse_settings import HftSettings
from graftlm.parts import count_parameters
from graftlm.training.config import RunConfig

NORMS = "norms"
"""Category of what is no matrix."""


def categories(model: nn.Module) -> dict[str, list[list[str]]]:
    """Modules that hold parameters of their own, by category and decoder layer: of matrices, the part of the layer that
    they are in (attention, FFN; "" of what the layer itself holds), and all others as `NORMS`."""
    path, layers = decoder_layers(model)
    found: dict[str, list[list[str]]] = {}
    for number, layer in enumerate(layers):
        for name, module in layer.named_modules():
            own = list(module.parameters(recurse=False))
            if own:
                category = name.partition(".")[0] if any(p.dim() > 1 for p in own) else NORMS
                by_layer = found.setdefault(category, [[] for _ in layers])
                by_layer[number].append(f"{path}.{number}.{name}".rstrip("."))
    return found


def halves(by_category: Mapping[str, list[list[str]]], generator: torch.Generator) -> set[str]:
    """Half of every category's modules in every layer, at random; where a layer has an odd number, every other such
    layer, at random too, gives one more."""
    chosen: set[str] = set()
    for layers in by_category.values():
        order = torch.randperm(len(layers), generator=generator).tolist()
        one_more = False
        for number in order:
            modules = layers[number]
            count = len(modules) // 2
            if len(modules) % 2:
                count += one_more
                one_more = not one_more
            chosen.update(modules[i] for i in torch.randperm(len(modules), generator=generator)[:count].tolist())
    return chosen


class Hft(Method):
    strategies = ("none",)  # DDP settles what it averages once, when a run begins

    def __init__(self, model: PreTrainedModel, config: RunConfig):
        super().__init__(model, config)
        self.settings: HftSettings = config.hft
        self.categories = categories(model)
        self.round = 0
        """That goes on, from 0."""
        self.begins: list[int] = []
        """Optimizer steps after which another round begins."""
        self._optimizer: Any = None

    # -- the contract -------------------------------------------------------------------------------------------------

    def start(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        self._optimizer = optimizer
        self.begins = self._boundaries(total_steps)
        self._begin_round()

    def after_step(self, step: int) -> None:
        if step in self.begins:
            self.round += 1
            self._begin_round()

    def state_dict(self) -> dict[str, Tensor]:
        return {"round": torch.tensor(self.round)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.round = int(state["round"])

    def finish(self) -> None:
        self.model.requires_grad_(True)

    @property
    def trainable(self) -> int:
        frozen = self._modules() - self.chosen()
        return count_parameters(self.model) - sum(
            p.numel() for name in frozen for p in self.model.get_submodule(name).parameters(recurse=False)
        )

    @property
    def notes(self) -> list[str]:
        share = self.trainable / count_parameters(self.model)
        rounds = (
            f"in {len(self.begins) + 1} rounds" if self.begins else "the same all along (hft.round_steps changes it)"
        )
        return [f"trainable: {share:.1%} of all parameters, {rounds}"]

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _boundaries(self, total_steps: int) -> list[int]:
        if self.settings.round_steps is not None:
            return list(range(self.settings.round_steps, total_steps, self.settings.round_steps))
        if self.config.max_steps > 0:  # which does not say how long an epoch is
            return []
        epochs = self.config.num_train_epochs
        return [step for i in range(1, int(epochs) + 1) if (step := round(i * total_steps / epochs)) < total_steps]

    def chosen(self) -> set[str]:
        """Modules of the decoder layers that train in this round."""
        seed = self.config.seed * 1_000_003 + self.round
        return halves(self.categories, torch.Generator().manual_seed(seed))

    def _modules(self) -> set[str]:
        return {name for layers in self.categories.values() for modules in layers for name in modules}

    def _begin_round(self) -> None:
        chosen = self.chosen()
        for name in self._modules():
            for parameter in self.model.get_submodule(name).parameters(recurse=False):
                parameter.requires_grad_(name in chosen)
                if name not in chosen:
                    parameter.grad = None
                    self._optimizer.state.pop(parameter, None)
