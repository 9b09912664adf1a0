"""What another method than APEX costs, asked of the method itself: prepared on a copy of the model without weights."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from graftlm.anatomy import Block, decoder_layers, read_anatomy
from graftlm.methods import make_method
from graftlm.methods.base import Method
from graftlm.training.config import RunConfig
from graftlm.training.costs import MethodFlops

UNKNOWN_STEPS = 1000
"""What a method is told where the number of steps is not known; it counts for nothing but when rounds begin."""


@dataclass
class Prepared:
    """A method on a copy of the model on the meta device."""

    config: RunConfig
    """Of the run, with what follows from the whole model written out (Method.resolved)."""
    method: Method
    notes: list[str]
    looks: tuple[int, bool] | None
    """Method.looks."""
    flops: MethodFlops

    @property
    def model(self) -> PreTrainedModel:
        return self.method.model


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def prepared(config: RunConfig, model: PreTrainedModel, steps: int | None) -> Prepared | None:
    """The method of `config` on a copy of `model`, begun as in a run of `steps` (None: not known); None for apex and
    full. Raises UserError for what the method refuses."""
    asked = make_method(without_weights(model), config)
    if asked is None:
        return None
    resolved = asked.resolved()
    bare = without_weights(model)
    first = [block for block in read_anatomy(bare).blocks if block.layer == 0]
    method = make_method(bare, resolved)
    assert method is not None
    method.prepare()
    # What trains may change while a run goes on; how much of it, less so.
    if steps is not None:
        method.check_steps(steps)
    method.start(torch.optim.SGD([p for p in bare.parameters() if p.requires_grad]), steps or UNKNOWN_STEPS)
    # One that has begun knows when it does what; a simpler one in its place has less to say.
    notes = method.notes if steps and type(method) is type(asked) else asked.notes
    return Prepared(resolved, method, notes, asked.looks(), _flops(method, first))


def _flops(method: Method, first: list[Block]) -> MethodFlops:
    """`first`: blocks of the first layer, read before the method put anything in."""
    model, found = method.model, MethodFlops(method.products(), method.gradients(), set(), 0)
    embedding: Any = model.get_input_embeddings()
    if embedding.weight.requires_grad or {block.kind for block in first} != {"heads", "channels"}:
        return found
    matrices = [m for block in first for m in (*block.mixed, *block.followers)]

    def trains(modules: set[str]) -> bool:
        parameters = (p for name in modules for p in model.get_submodule(name).parameters())
        return bool(modules & found.gradients.keys()) or any(p.requires_grad for p in parameters)

    known = {id(p) for m in matrices for p in model.get_submodule(m.module).parameters()}
    if any(p.requires_grad and id(p) not in known for p in decoder_layers(model)[1][0].parameters()):
        return found  # a norm trains before all of them
    # In the order in which a token passes them.
    for roles in (("q", "k", "v"), ("o",), ("up", "gate"), ("down",)):
        modules = {m.module for m in matrices if m.role in roles}
        found.unreached |= {reader for name in modules for reader in method.readers(name)}
        if roles == ("q", "k", "v"):
            keys = {m.module for m in matrices if m.role in ("q", "k")}
            found.saved = 0 if trains(keys) else 3 if trains(modules) else 4
        if trains(modules):
            break
    return found
