"""A training loop with one of the methods, and its slow oracle: full gradients, a mask, the same optimizer."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from tiny_models import batches

from graftlm.methods import make_method
from graftlm.methods.base import Method
from graftlm.training.config import RunConfig, SourceConfig

ADAM = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def run_config(method: str, **changes) -> RunConfig:
    return RunConfig(model="tiny-llama", data=(SourceConfig("none.txt"),), method=method, **changes)


def ademamix(parameters, *, paged: bool = False, **options):
    """Whose two first moments of a parameter are one tensor."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdEMAMix(parameters, is_paged=paged, **{"betas": (0.9, 0.95, 0.9999), **options})


def look_at(count: int = 3) -> Callable[[int], Iterable]:
    return lambda samples: iter(batches(count, seed=9))


def begun(model, method: str, *, total: int = 12, optimizer=torch.optim.AdamW, options=None, **changes):
    """A method that has been started, and its optimizer."""
    made = make_method(model, run_config(method, **changes))
    made.prepare()
    made.look(look_at())
    bound = optimizer([p for p in model.parameters() if p.requires_grad], **(ADAM if options is None else options))
    made.start(bound, total)
    return made, bound


def train(method: Method, optimizer, data, *, accumulate: int = 1, clip: float = 1.0, first: int = 1, each=None):
    """Steps on `data`, `accumulate` batches each; `each(step)` is called before every optimizer step."""
    for step in range(first, first + len(data) // accumulate):
        begin = (step - first) * accumulate
        for batch in data[begin : begin + accumulate]:
            (method.model.train()(**batch).loss / accumulate).backward()
        method.after_backward()
        torch.nn.utils.clip_grad_norm_(method.model.parameters(), clip)
        if each is not None:
            each(step)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def plain_copy(model):
    return copy.deepcopy(model)


def masked_training(model, data, masks_of, *, accumulate: int = 1, clip: float = 1.0, optimizer=torch.optim.AdamW):
    """Plain training in which `masks_of(step, gradients)` says what each step may change, by parameter name; what it
    leaves out does not train at all."""
    made = optimizer(model.parameters(), **ADAM)
    for step in range(1, len(data) // accumulate + 1):
        for batch in data[(step - 1) * accumulate : step * accumulate]:
            (model.train()(**batch).loss / accumulate).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        masks = masks_of(step, gradients)
        for name, p in model.named_parameters():
            p.grad = p.grad * masks[name] if name in masks else None
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = weights(model)
        made.step()
        made.zero_grad()
        with torch.no_grad():
            for name, mask in masks.items():
                p = model.get_parameter(name)
                p.copy_(torch.where(mask, p, before[name]))


def assert_close(ours, theirs, tolerance: float = 1e-6) -> None:
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert (a[name] - value).abs().max() <= tolerance, name
