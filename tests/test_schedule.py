"""The learning rate over stages, against what it should be, written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR

from graftlm.apex_config import ApexConfig
from graftlm.training.schedule import follows_stages, refresh, stage_factor

TOTAL, STARTS = 20, [0, 6, 13]


def cosine(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / TOTAL))


def factors(config: ApexConfig, *, warmup: int = 0, rate: float = 2.0) -> list[float]:
    given_ = {"base": cosine, "learning_rate": rate, "warmup_steps": warmup, "total_steps": TOTAL}
    return [stage_factor(step, STARTS, config, **given_) for step in range(TOTAL)]


def test_a_rate_per_stage():
    config = ApexConfig(stages=3, stage_learning_rates=(1.0, 0.5, 0.1))
    assert factors(config) == [0.5] * 6 + [0.25] * 7 + [0.05] * 7


def test_a_rate_per_stage_after_the_warmup():
    config = ApexConfig(stages=3, stage_learning_rates=(2.0, 0.5, 0.1))
    assert factors(config, warmup=4)[:7] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.25]


def test_one_schedule_with_a_rewarmup():
    """0.2 of 20 steps: four steps of climbing after each boundary, and none at the start of the run."""
    climbing = [0.25, 0.5, 0.75, 1.0]
    expected = [cosine(step) for step in range(TOTAL)]
    for start in STARTS[1:]:
        for i, share in enumerate(climbing):
            expected[start + i] *= share
    assert factors(ApexConfig(stages=3, rewarmup_ratio=0.2)) == pytest.approx(expected, abs=1e-15)


def test_a_rate_per_stage_with_a_rewarmup():
    config = ApexConfig(stages=3, stage_learning_rates=(2.0, 2.0, 2.0), rewarmup_ratio=0.1)
    assert factors(config) == [1.0] * 6 + [0.5] + [1.0] * 6 + [0.5] + [1.0] * 6


def test_stages_alone_change_nothing():
    assert factors(ApexConfig(stages=3)) == [cosine(step) for step in range(TOTAL)]
    assert not follows_stages(ApexConfig(stages=3))
    assert follows_stages(ApexConfig(stages=3, rewarmup_ratio=0.01))
    assert follows_stages(ApexConfig(stages=1, stage_learning_rates=(1.0,)))


@settings(max_examples=30, deadline=None)
@given(
    starts=st.lists(st.integers(1, TOTAL - 1), max_size=4, unique=True).map(sorted),
    rewarmup=st.floats(0, 0.9),
    warmup=st.integers(0, 5),
)
def test_a_rate_is_never_above_its_stage_s_and_never_negative(starts, rewarmup, warmup):
    starts = [0, *starts]
    rates = tuple(1.0 / (i + 1) for i in range(len(starts)))
    config = ApexConfig(stages=len(starts), stage_learning_rates=rates, rewarmup_ratio=rewarmup)
    for step in range(TOTAL):
        given_ = {"base": cosine, "learning_rate": 1.0, "warmup_steps": warmup, "total_steps": TOTAL}
        factor = stage_factor(step, starts, config, **given_)
        stage = sum(start <= step for start in starts) - 1
        assert 0 < factor <= rates[stage]


def test_refresh_recomputes_the_coming_step():
    """A boundary is known only after the scheduler has stepped: the coming step must not go at the old rate."""
    factor = {"now": 1.0}
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 3.0)])
    scheduler = LambdaLR(optimizer, lambda step: factor["now"] / (1 + step))
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5, 1.5]
    factor["now"] = 0.5
    refresh(scheduler, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr() == [0.25, 0.75]
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([1 / 6, 0.5])
