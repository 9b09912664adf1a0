"""A training loop with APEX, for tests."""

import torch
from tiny_models import batches

from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig

REGIMES = [{}, {"trains": "half", "budget": 0.7}, {"trains": "small", "budget": 0.2}]
QUARTER = {"k_heads": 0.25, "k_channels": 0.25}
REPEATED = batches(1, rows=8) * 12  # something that can be learnt


def begun(model, *, lr=1e-2, total_steps=12, optimizer=torch.optim.AdamW, assess_on=None, **options):
    """An Apex in its first stage and its optimizer."""
    apex = Apex(model, ApexConfig(**{"stages": 1, **QUARTER, **options}), total_steps=total_steps)
    made = optimizer(model.parameters(), lr=lr, weight_decay=0.1)
    apex.start(made, assess_on=batches(2) if assess_on is None else assess_on)
    return apex, made


def random_operators(apex: Apex) -> None:
    """Give every operator a value, so that the first step already goes through M."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tie in apex.ties:
            for parameter in tie.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        for expansion in apex.expansions:
            expansion.restore()
            expansion.apply()


def train(apex, optimizer, data, **advance) -> list[float]:
    """The loop of the README; returns the losses."""
    losses = []
    for batch in data:
        loss = apex.model.train()(**batch).loss
        losses.append(float(loss.detach()))
        penalty = apex.penalty()
        (loss if penalty is None else loss + penalty).backward()
        apex.pull_back()
        torch.nn.utils.clip_grad_norm_(apex.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        apex.advance(**advance)
    return losses


def same(a: dict, b: dict) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def copied(state: dict) -> dict:
    return {k: v.clone() for k, v in state.items()}
