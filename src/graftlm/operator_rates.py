"""Operators in the optimizer: parameter groups of their own, without weight decay, at a learning rate of their own.

The authors' diagonals are no operators: without weight decay too, but at the optimizer's rate.
"""

from collections.abc import Sequence
from typing import Any

import torch

from graftlm.errors import UserError
from graftlm.ties import Tie


class OperatorRates:
    """Learning rates of operators: the optimizer's, times a multiplier, during its step only.

    A schedule that writes the groups' rates, and a checkpoint that keeps them, see the optimizer's own.
    """

    def __init__(self, ties: Sequence[Tie], apart: bool):
        """Args:
        apart: whether each tie has a multiplier of its own.
        """
        self._ties = ties
        self._apart = apart
        self.multipliers: list[float] = []
        """Operator learning rate over the learning rate, by tie; set when a stage begins."""
        self._groups: list[tuple[int, int]] = []
        """Parameter group of each operator (of all, where they share a rate), with the place of its tie."""
        self._before: dict[int, Any] = {}
        """During a step: the learning rates that its groups had before."""

    def join(self, optimizer: torch.optim.Optimizer, needed: Sequence[torch.nn.Parameter]) -> None:
        """Move the operators' parameters to groups of their own. Raises UserError if one of `needed` is not there."""
        has = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) not in has for p in needed):
            raise UserError(
                "apex: the optimizer lacks the operators or slices; make it over model.parameters() after Apex(model)"
            )
        ours = {id(p) for tie in self._ties for p in tie.parameters()}
        template: dict[str, Any] = {}
        for group in optimizer.param_groups:
            kept = [p for p in group["params"] if id(p) not in ours]
            if len(kept) < len(group["params"]):
                template = {k: v for k, v in group.items() if k != "params"}
                group["params"] = kept
        places = range(len(self._ties))
        self._groups = []
        for ties in [[i] for i in places] if self._apart else [list(places)]:
            parameters = [p for i in ties for p in self._ties[i].operator.parameters()]
            if parameters:
                optimizer.add_param_group({**template, "params": parameters, "weight_decay": 0.0})
                self._groups.append((len(optimizer.param_groups) - 1, ties[0]))
        operators = {id(p) for tie in self._ties for p in tie.operator.parameters()}
        diagonals = [p for tie in self._ties for p in tie.parameters() if id(p) not in operators]
        if diagonals:
            optimizer.add_param_group({**template, "params": diagonals, "weight_decay": 0.0})

    def begin_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._before = {group: optimizer.param_groups[group]["lr"] for group, _ in self._groups}
        for group, tie in self._groups:
            optimizer.param_groups[group]["lr"] = self._before[group] * self.multipliers[tie]

    def end_step(self, optimizer: torch.optim.Optimizer) -> None:
        for group, rate in self._before.items():
            optimizer.param_groups[group]["lr"] = rate  # as it was: multiplying back would round
