"""What a way of training is to the trainer: a few moments of a run at which it may act."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftlm.modes import mixed

if TYPE_CHECKING:
    from graftlm.training.config import RunConfig

Batches = Callable[[int], Iterator[dict[str, Tensor]]]
"""Batches of so many training sequences, spread evenly over the data: input_ids, labels and what else the model takes,
[B, S] each, on the model's device."""


class Method:
    """One way of training a model, other than plainly. RunTrainer calls these in the order in which they stand here.

    What a subclass does not need it leaves as it is. All of it must follow from the config, its seed and the model, so
    that a resumed run goes on bit for bit; what does not belongs in `state_dict`.
    """

    strategies: ClassVar[tuple[str, ...]] = ("none", "ddp")
    """distributed.strategy that it can run under."""

    def __init__(self, model: PreTrainedModel, config: "RunConfig"):
        self.model = model
        self.config = config

    def prepare(self) -> None:
        """Once, before the optimizer is made and before a checkpoint is loaded: add parameters (their
        names must not depend on the data), freeze what never trains. A parameter that trains at any time of the run
        must require a gradient when this returns. Raises UserError for a model that the method cannot train."""

    def check_steps(self, total_steps: int) -> None:
        """Before `look`: raise UserError for settings that a run of `total_steps` cannot have. Not asked where the
        number is not known, or made up for an estimate."""

    def look(self, batches: Batches) -> None:
        """Before the first step of a run that is not resumed, before the optimizer is made: see data without training
        on it. Draws no global random number. The model runs as in training within `mixed` alone."""

    def mixed(self) -> torch.autocast:
        """The autocast that the run trains under. Not for decompositions: their products would be of bfloat16."""
        return mixed(self.model, self.config.bf16)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """In the place of `look` in a resumed run: what `state_dict` gave. The checkpoint's weights are loaded after
        this, so parameters whose shapes follow from data get them here."""

    def start(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """When the optimizer has been made (its loaded state follows, in a resumed run). `total_steps`: of the run."""

    def rate_factor(self, step: int) -> float:
        """Factor on the scheduled learning rate of optimizer step `step` (from 0)."""
        return 1.0

    def after_backward(self) -> None:
        """In every optimizer step, after its last backward pass: `.grad` holds the mean gradient of the step, not yet
        clipped."""

    def after_step(self, step: int) -> None:
        """After optimizer step `step` (from 1), gradients gone; checkpoints are written after this."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides model, optimizer and random states."""
        return {}

    def finish(self) -> None:
        """After the last step: make the model an ordinary one of its family, which computes the same."""

    # -- for estimates (training/estimates.py); the method is made and prepared on a copy without weights -------------

    def resolved(self) -> "RunConfig":
        """The config, with what follows from the whole model written out: for a copy that has fewer layers."""
        return self.config

    def products(self) -> dict[str, tuple[int, bool]]:
        """Products with every token that no nn.Linear of the prepared model shows, by the path of the nn.Linear whose
        input they take: how many weights, and whether these train."""
        return {}

    def gradients(self) -> dict[str, int]:
        """Weights whose gradients are computed for every token although no parameter of their nn.Linear asks for them,
        by the path of the nn.Linear."""
        return {}

    def readers(self, path: str) -> set[str]:
        """Of the prepared model, the modules that take the input of the nn.Linear that was at `path`."""
        return {path}

    def flops(self) -> tuple[int, int]:
        """Floating-point operations besides products with tokens: of an optimizer step, and of a micro-batch."""
        return 0, 0

    def working_bytes(self) -> int:
        """What an optimizer step holds for the method besides weights, gradients and the optimizer's state."""
        return 0

    def looks(self) -> tuple[int, bool] | None:
        """Sequences that `look` sees, and whether it takes gradients; None where it does more than can be foreseen."""
        return 0, False

    @property
    def trainable(self) -> int:
        """Parameters that train, or, where these change, that train at any one time."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def notes(self) -> list[str]:
        """What a user should know about this model and these settings."""
        return []
