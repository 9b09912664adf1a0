"""Tensors and optimizer state on disk: the same bits come back, or one line says why not."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Adafactor

from graftlm.checkpointing import (
    check_tensors,
    load_optimizer,
    load_tensors,
    load_tensors_and_metadata,
    save_optimizer,
    save_tensors,
)
from graftlm.errors import UserError
from graftlm.training.checkpoints import load_random_state, save_random_states

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9)),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
    "plain-sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2),
    "adafactor": lambda groups: Adafactor(groups, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9),
    "adafactor-relative": lambda groups: Adafactor(groups, lr=None, relative_step=True, warmup_init=True),
}


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False))


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(step))
        network(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def make(kind: str, network: nn.Module) -> torch.optim.Optimizer:
    first, second = network
    return OPTIMIZERS[kind]([{"params": first.parameters()}, {"params": second.parameters(), "weight_decay": 0.1}])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_going_on_is_the_same_as_never_having_stopped(kind, tmp_path):
    network = model()
    optimizer = make(kind, network)
    train(network, optimizer, range(3))
    extra = {"scheduler": {"last_epoch": 3, "rates": [0.1, 1e-30]}, "note": None}
    save_optimizer(tmp_path / "o.safetensors", optimizer, extra)
    resumed = copy.deepcopy(network)
    other = make(kind, resumed)
    assert load_optimizer(tmp_path / "o.safetensors", other) == extra
    for ours, theirs in zip(other.param_groups, optimizer.param_groups, strict=True):
        plain = {k for k in theirs if k != "params"}
        assert {k: ours[k] for k in plain} == {k: theirs[k] for k in plain}
        assert {k: type(ours[k]) for k in plain} == {k: type(theirs[k]) for k in plain}
    train(network, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    for ours, theirs in zip(resumed.parameters(), network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_optimizer_over_other_parameters_is_refused(tmp_path):
    network = model()
    save_optimizer(tmp_path / "o.safetensors", make("adamw", network))
    other = torch.optim.AdamW(network.parameters())
    with pytest.raises(UserError, match=r"o\.safetensors: written with other settings"):
        load_optimizer(tmp_path / "o.safetensors", other)


def test_tensors_of_every_kind_come_back(tmp_path):
    shared = torch.arange(12.0).view(3, 4)
    tensors = {
        "bf16": torch.randn(3).to(torch.bfloat16),
        "int": torch.tensor(2**62),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "view": shared[:, 1],
        "same memory": shared,
        "nan": torch.tensor([float("nan"), float("inf")], dtype=torch.float64),
    }
    save_tensors(tmp_path / "sub" / "t.safetensors", tensors, {"a": [1, "é"]})
    back, metadata = load_tensors_and_metadata(tmp_path / "sub" / "t.safetensors")
    assert metadata == {"a": [1, "é"]}
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key].nan_to_num(nan=7), value.nan_to_num(nan=7))
    assert load_file(tmp_path / "sub" / "t.safetensors").keys() == tensors.keys()  # and no private format
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["t.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "text", "missing"])
@pytest.mark.parametrize("read", [load_tensors, check_tensors])
def test_a_damaged_file_is_named(damage, read, tmp_path):
    path = tmp_path / "step-4" / "optimizer.safetensors"
    save_tensors(path, {"a": torch.arange(100.0)})
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        damaged = {"truncated": whole[:-40], "header": whole[:20], "empty": b"", "text": json.dumps({"a": 1}).encode()}
        path.write_bytes(damaged[damage])
    with pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert line.endswith(f"delete the checkpoint {path.parent} and go on from an earlier one")
    assert "\n" not in line


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.zeros(3)})
    with pytest.raises(TypeError):
        save_tensors(path, {"a": torch.ones(3)}, metadata={1, 2})  # no JSON: fails in the middle
    assert torch.equal(load_tensors(path)["a"], torch.zeros(3))
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


def test_every_stream_of_random_numbers_goes_on(tmp_path):
    def drawn():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    drawn()
    save_random_states(tmp_path)
    first = drawn()
    assert drawn() != first
    load_random_state(tmp_path)
    assert drawn() == first
