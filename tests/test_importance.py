"""APEX with P and N chosen by weight magnitude or by gradient."""

import copy

import pytest
import torch
from tiny_loop import QUARTER, begun, same, train
from tiny_models import batches, tiny_model

from graftlm.anatomy import read_anatomy
from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.errors import UserError
from graftlm.importance import GradientScores


def slow_scores(model, block, tensors) -> torch.Tensor:
    """By component: sum over matrices of the squared norm of its rows or columns over the mean of all components'."""
    total = torch.zeros(block.components, dtype=torch.float64)
    for matrix in block.mixed:
        energy = torch.zeros(block.components, dtype=torch.float64)
        for component in range(block.components):
            for index in matrix.index(torch.tensor([component])).flatten().tolist():
                energy[component] += (
                    tensors[f"{matrix.module}.weight"].double().select(matrix.dim, index).square().sum()
                )
        total += energy / energy.mean()
    return total


def by_component(block, scores) -> torch.Tensor:
    return scores.view(block.components, block.slots).sum(1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_magnitude(family):
    model = tiny_model(family)
    apex, optimizer = begun(model, assessment="magnitude", stages=2, total_steps=4)
    before = model.state_dict()
    for block in apex.anatomy.blocks:
        expected = slow_scores(model, block, before)
        assert torch.allclose(by_component(block, apex.scores()[block.name]), expected)
        size = apex.sizes[block.name]
        assert set(apex.choices[block.name].advantageous.tolist()) == set(expected.topk(size).indices.tolist())
    train(apex, optimizer, batches(2))  # the second stage begins: by the fused weights
    for block in apex.anatomy.blocks:
        order = slow_scores(model, block, model.state_dict()).argsort(descending=True)
        assert torch.equal(apex.choices[block.name].order, order)


def test_gradient_checkpointing_holds_while_gradients_are_assessed():
    """Else a run that fits only with it would not get as far as its first step; and dropout stays off."""
    found = []
    for checkpoints in (False, True):
        model = tiny_model(attention_dropout=0.5)
        if checkpoints:
            model.activation_checkpointing_enable()
        passes = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        scores = GradientScores(model, read_anatomy(model).blocks)
        model.train()
        scores.run(batches(3))
        assert len(passes) == (6 if checkpoints else 3)
        assert all(module.training for module in model.modules())
        found.append(scores.scores())
    for name, values in found[0].items():
        torch.testing.assert_close(values, found[1][name])


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_gradient_before_training_and_over_a_stage(family):
    model = tiny_model(family)
    data, seen = batches(5), batches(3, seed=7)
    sums: dict[str, list[torch.Tensor]] = {}

    def count(of):
        for name, p in of.named_parameters():
            if p.grad is not None and p.dim() == 2:
                sums.setdefault(name, []).append(p.grad.clone())

    plain = copy.deepcopy(model).eval()
    for batch in seen:
        plain.zero_grad()
        plain(**batch).loss.backward()
        count(plain)
    apex, optimizer = begun(model, assessment="gradient", stages=2, total_steps=6, assess_on=seen)

    def expected(block):
        total = torch.zeros(block.components, dtype=torch.float64)
        for matrix in block.mixed:
            energy = torch.zeros(block.components, dtype=torch.float64)
            for component in range(block.components):
                for index in matrix.index(torch.tensor([component])).flatten().tolist():
                    for gradient in sums[f"{matrix.module}.weight"]:
                        energy[component] += gradient.double().select(matrix.dim, index).square().sum()
            total += energy / energy.mean()
        return total

    for block in apex.anatomy.blocks:
        assert torch.equal(apex.choices[block.name].order, expected(block).argsort(descending=True))
    sums.clear()
    for step, batch in enumerate(data[:3]):
        # Gradients as the backward pass leaves them, by effective weights.
        probe = copy.deepcopy({n: p.detach() for n, p in model.named_parameters()})
        twin = tiny_model(family)
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(probe[name])
        twin.train()(**batch).loss.backward()
        count(twin)
        if step == 2:
            score = {block.name: expected(block) for block in apex.anatomy.blocks}
        train(apex, optimizer, [batch])
    assert apex.clock.stage == 1
    for block in apex.anatomy.blocks:
        found = torch.argsort(score[block.name], descending=True)
        assert torch.equal(apex.choices[block.name].order, found)


@pytest.mark.parametrize("assessment", ["magnitude", "gradient"])
def test_goes_on_bit_for_bit(assessment):
    """Stopped in the middle of a stage, whose gradients so far are part of the state."""
    options = {"assessment": assessment, "stages": 2, "total_steps": 6}
    data = batches(5)
    model = tiny_model()
    apex, optimizer = begun(model, **options)
    train(apex, optimizer, data[:2])
    kept = copy.deepcopy((model.state_dict(), apex.state_dict(), optimizer.state_dict()))
    train(apex, optimizer, data[2:])
    again = tiny_model(seed=3)
    again.load_state_dict(kept[0])
    other = Apex(again, ApexConfig(assessment=assessment, stages=2, **QUARTER), total_steps=6)
    other.load_state_dict(kept[1])
    made = torch.optim.AdamW(again.parameters(), lr=1e-2, weight_decay=0.1)
    other.start(made)
    made.load_state_dict(kept[2])
    train(other, made, data[2:])
    same(again.state_dict(), model.state_dict())
    same(other.state_dict(), apex.state_dict())


def test_bad_settings():
    with pytest.raises(UserError, match=r"apex\.assessment: gradient .* trains: full"):
        ApexConfig(assessment="gradient", trains="small")
    with pytest.raises(UserError, match=r"apex\.start: split"):
        ApexConfig(assessment="magnitude", start="split")
    apex = Apex(tiny_model(), ApexConfig(assessment="gradient", stages=1, **QUARTER))
    with pytest.raises(UserError, match="nothing was assessed"):
        apex.start(torch.optim.AdamW(apex.model.parameters()))
