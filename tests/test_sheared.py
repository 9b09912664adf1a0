"""Sheared-LLaMA: hard concrete gates, their constraint, and what they choose."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, batches, tiny_model

from graftlm.anatomy import linear, read_anatomy
from graftlm.errors import UserError
from graftlm.masking import masked
from graftlm.pruning.hard_concrete import LARGEST, Constraint, open_probability, sampled, settled
from graftlm.pruning.methods.sheared import _backward, _rate, gate_rate, learn_masks, multiply_gates
from graftlm.pruning.prune import prune
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.surgery import prunable_blocks
from graftlm.pruning.targets import find_target


def calibration(iteration: int):
    return batches(1, rows=4, seed=iteration + 1)


def chosen(**changes) -> PruneSettings:
    return PruneSettings(**{"method": "sheared", "sparsity": 0.4, "sheared_steps": 12, **changes})


@settings(deadline=None, max_examples=20)
@given(st.floats(-4, 4))
def test_open_probability_by_drawing(log_alpha):
    noise = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    gates = sampled(torch.full_like(noise, log_alpha), noise)
    assert float(gates.min()) >= 0 and float(gates.max()) <= 1
    assert float(open_probability(torch.tensor(log_alpha))) == pytest.approx(
        float((gates > 0).float().mean()), abs=0.01
    )


def test_gates_close_and_open_for_good():
    noise = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    assert float((sampled(torch.full_like(noise, -LARGEST), noise) == 0).float().mean()) > 0.95
    assert float((sampled(torch.full_like(noise, LARGEST), noise) == 1).float().mean()) > 0.95
    assert float(settled(torch.tensor(LARGEST))) > 0.99


def test_sampled_gates_have_gradients():
    log_alpha = torch.zeros(5, requires_grad=True)
    sampled(log_alpha, torch.full((5,), 0.5)).sum().backward()
    assert log_alpha.grad is not None and bool((log_alpha.grad > 0).all())


def test_constraint_by_hand():
    constraint = Constraint()
    constraint.linear.data.fill_(2.0)
    constraint.quadratic.data.fill_(10.0)
    found = constraint(torch.tensor([0.1, 0.5]), torch.tensor([0.3, 0.3]))
    by_hand = ((2 * -0.2 + 10 * 0.04) + (2 * 0.2 + 10 * 0.04)) / 2
    assert float(found.detach()) == pytest.approx(by_hand, abs=1e-6)


def test_the_loss_is_the_mean_over_tokens_whatever_the_passes():
    model = tiny_model()
    [rows] = batches(1, rows=12)
    halves = [{key: value[:9] for key, value in rows.items()}, {key: value[9:] for key, value in rows.items()}]
    whole = _backward(model, [rows], torch.zeros(()))
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    assert _backward(model, halves, torch.zeros(())) == pytest.approx(whole, rel=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_gates_can_close_in_however_few_steps():
    assert gate_rate(100) == 0.5 and gate_rate(3200) == 50 / 3200 and gate_rate(10) == 1.0
    assert chosen(sheared_gate_rate=0.1).sheared_gate_rate == 0.1
    pruned = prune(tiny_model(), chosen(sheared_steps=100), calibration)
    assert float(pruned.notes[0].split("target by ")[1].split()[0]) < 0.1


def test_learning_rate_of_weights_rises_and_falls():
    rates = [_rate(step, 100) for step in range(100)]
    assert rates[0] < 0.1 and max(rates) <= 1.0 and rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_gates_come_to_their_targets(family):
    model = tiny_model(family)
    blocks = prunable_blocks(model)
    targets = {block.name: 0.5 if block.kind == "heads" else 0.25 for block in blocks}
    learned = learn_masks(model, blocks, targets, calibration, chosen(sheared_steps=150, sheared_gate_rate=0.1))
    for name, sparsity in learned.sparsity.items():
        assert sparsity == pytest.approx(targets[name], abs=0.08)
    assert len(learned.losses) == 150
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gates_close_what_does_nothing():
    """Of channels that add nothing, and never did while the model learned, and channels that do, the former go."""
    model = tiny_model(seed=5)
    data = batches(1, rows=8, seed=3)
    idle = torch.arange(0, 24, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.data[:, idle] = 0
        model(**data[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, idle] = 0
    blocks = [block for block in prunable_blocks(model) if block.kind == "channels"]
    targets = {block.name: 7 / 24 for block in blocks}
    learned = learn_masks(model, blocks, targets, lambda _: data, chosen(sheared_steps=80, sheared_weight_rate=0.0))
    for block in blocks:
        gone = set(learned.scores[block.name].argsort()[:7].tolist())
        assert len(gone & set(idle.tolist())) >= 6


@pytest.mark.parametrize("family", FAMILIES)
def test_target_is_met_and_layers_are_alike(family):
    target = find_target(tiny_model(family), chosen(), uniform=True)
    pruned = prune(tiny_model(family), chosen(), calibration)
    assert len(set(pruned.shapes)) == 1
    wanted = pruned.original_parameters - target.original + target.budget
    # Within a channel of every layer.
    assert wanted - target.sizes[1].one_step * len(pruned.shapes) < pruned.parameters <= wanted
    assert pruned.parameters == sum(p.numel() for p in pruned.model.parameters())
    assert not type(pruned.model).__name__.startswith("PerLayer") or family in ("phi3", "olmo2")
    assert "steps, loss" in pruned.notes[0]


def test_masks_only_leaves_the_weights():
    model, original = tiny_model(), tiny_model()
    grads = []
    learn_masks(
        model,
        prunable_blocks(model),
        {b.name: 0.5 for b in prunable_blocks(model)},
        calibration,
        chosen(sheared_weight_rate=0.0),
        heard=lambda step, sparsities: grads.extend(p.grad for p in model.parameters()),
    )
    assert grads and all(grad is None for grad in grads)  # none is computed, and added up, for nothing
    assert all(parameter.requires_grad for parameter in model.parameters())
    for (name, now), then in zip(model.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(now, then), name
        assert now.grad is None
    learn_masks(model, prunable_blocks(model), {b.name: 0.5 for b in prunable_blocks(model)}, calibration, chosen())
    assert not torch.equal(model.lm_head.weight, original.lm_head.weight)


def test_weights_of_few_bits_train_as_those_of_many():
    def moved(dtype: torch.dtype) -> torch.Tensor:
        model, original = tiny_model(), tiny_model()
        for one in (model, original):  # as many rounded bits in both
            one.bfloat16().to(dtype)
        pruned = prune(model, chosen(sheared_steps=20), calibration)
        assert pruned.model.dtype == dtype
        return (pruned.model.lm_head.weight - original.lm_head.weight).float().detach()

    wide, narrow = moved(torch.float32), moved(torch.bfloat16)
    # Half of bfloat16's step at a weight of 0.15 is 5e-4, five times the largest update.
    far = wide.abs() > 5e-4
    assert far.float().mean() > 0.2 and (narrow[far] != 0).float().mean() > 0.8
    assert torch.nn.functional.cosine_similarity(wide[far], narrow[far], dim=0) > 0.8


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_are_multiplied_into_the_output_projections(family):
    """A gate of 0 is a mask; multiplied into the weights it is the same."""
    model = tiny_model(family)
    anatomy = read_anatomy(model, smallest=1)
    blocks = anatomy.blocks
    closed = {b.name: torch.arange(b.components) % 2 == 0 for b in blocks}
    scores = {name: torch.where(shut, -1e4, 1e4) for name, shut in closed.items()}
    units = {b.name: closed[b.name].repeat_interleave(b.slots).nonzero().flatten() for b in blocks}
    ids = batches(1)[0]["input_ids"]
    with masked(model, anatomy, units):
        want = model(ids).logits.detach()
    multiply_gates(model, blocks, scores)
    torch.testing.assert_close(model(ids).logits, want)
    assert all(not linear(model, b.output.module).weight[:, : b.slots * b.width].any() for b in blocks)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_same_seed_same_model(dropout):
    before = torch.get_rng_state()
    one, two, other = (
        prune(tiny_model(attention_dropout=dropout), chosen(seed=seed), calibration) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)  # what a program draws beside it stays
    for (name, a), b in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert one.notes == two.notes != other.notes


def test_batches_of_a_step_are_one_step():
    """Gradients that are added up batch by batch are those of all rows at once."""
    both = batches(1, rows=6, seed=1)
    halves = [{name: rows[part] for name, rows in both[0].items()} for part in (slice(3), slice(3, 6))]
    found = []
    for data in (both, halves):
        model = tiny_model(dtype=torch.float64)
        blocks = prunable_blocks(model)
        learned = learn_masks(model, blocks, {b.name: 0.5 for b in blocks}, lambda _, data=data: data, chosen())
        found.append((learned, model))
    (one, model), (two, other) = found
    assert one.losses == pytest.approx(two.losses, rel=1e-5)
    for name, scores in one.scores.items():
        torch.testing.assert_close(scores, two.scores[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.lm_head.weight, other.lm_head.weight, rtol=1e-4, atol=1e-5)


def test_it_tells_its_progress_and_can_be_interrupted():
    heard = []
    pruned = prune(tiny_model(), chosen(sheared_steps=100, sheared_gate_rate=0.5), calibration, heard.append)
    *training, last = heard
    assert [(step.iteration, step.iterations) for step in training] == [(i + 1, 100) for i in range(100)]
    assert training[0].parameters > training[-1].parameters  # what the gates are expected to leave
    assert abs(training[-1].parameters - pruned.parameters) < 0.2 * (pruned.original_parameters - pruned.parameters)
    assert (last,) == pruned.steps and last.parameters == pruned.parameters

    def interrupted(step):
        raise KeyboardInterrupt

    model = tiny_model()
    with pytest.raises(KeyboardInterrupt):
        prune(model, chosen(), calibration, interrupted)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sheared_steps": 0}, "sheared_steps"),
        ({"sheared_gate_rate": 0.0}, "sheared_gate_rate"),
        ({"sheared_multiplier_rate": 0.0}, "sheared_multiplier_rate"),
        ({"sheared_weight_rate": -1.0}, "sheared_weight_rate"),
        ({"uniform": False}, "leave uniform out"),
        ({"sparsity": 0.99}, "more than can go"),
    ],
)
def test_bad_settings(change, says):
    with pytest.raises(UserError, match=says):
        prune(tiny_model(), chosen(**change), calibration)


def test_gates_settle_as_the_authors_do():
    assert float(settled(torch.tensor(1.0))) == pytest.approx(1 / (1 + math.exp(-0.8 / (2 / 3))))
