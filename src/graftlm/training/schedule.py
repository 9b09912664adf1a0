"""Learning rate over stages: a rate per stage, or one schedule with a re-warmup at each boundary (section 4.2)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from graftlm.apex_config import ApexConfig


def base_schedule(
    name: str, learning_rate: float, warmup_steps: int, total_steps: int, kwargs: Mapping[str, Any] | None
) -> LambdaLR:
    """One of transformers' schedules on an optimizer of nothing, for its factors. Raises TypeError and ValueError for
    `kwargs` that it does not take, or misses."""
    nothing = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=learning_rate)
    told = dict(kwargs) if kwargs else None
    return get_scheduler(name, nothing, warmup_steps, total_steps, scheduler_specific_kwargs=told)


def stage_factor(
    step: int,
    starts: Sequence[int],
    config: ApexConfig,
    *,
    base: Callable[[int], float],
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
) -> float:
    """Factor on `learning_rate` at optimizer step `step` (from 0), where stages began at the steps `starts`.

    With apex.stage_learning_rates, the rate is constant within a stage, after the run's warmup; otherwise it is `base`,
    the schedule that the run would have without stages. rewarmup_ratio climbs from 0 again after each boundary.
    """
    stage = max(i for i, start in enumerate(starts) if start <= step)
    if config.stage_learning_rates is not None:
        factor = config.stage_learning_rates[stage] / learning_rate * min(1.0, (step + 1) / max(1, warmup_steps))
    else:
        factor = base(step)
    rewarmup = round(config.rewarmup_ratio * total_steps)
    if stage > 0 and rewarmup > 0:
        factor *= min(1.0, (step - starts[stage] + 1) / rewarmup)
    return factor


def follows_stages(config: ApexConfig) -> bool:
    """Whether stages change the learning rate at all."""
    return config.stage_learning_rates is not None or config.rewarmup_ratio > 0


def refresh(scheduler: LambdaLR, optimizer: torch.optim.Optimizer) -> None:
    """Recompute the learning rate of the coming step: a boundary is only known after the scheduler has stepped."""
    rates = []
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
        rates.append(group["lr"])
    scheduler._last_lr = rates


def scale_rates(scheduler: LambdaLR, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> None:
    """Multiply the learning rate of every step (from 0) by `factor`."""

    def scaled(base: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: base(step) * factor(step)

    scheduler.lr_lambdas = [scaled(base) for base in scheduler.lr_lambdas]
    refresh(scheduler, optimizer)
