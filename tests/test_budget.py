"""How many components train, and which (regimes half and small)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, batches, tiny_model

from graftlm.advantage import Choice
from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.budget import Counts
from graftlm.errors import UserError

# A channel is 192 of 460,000 parameters, less than 0.1 point.
FINE = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 16}


def begun(model, **options) -> Apex:
    options = {"stages": 1, **options}
    apex = Apex(model, ApexConfig(**options), total_steps=10)
    apex.start(torch.optim.AdamW(model.parameters()), assess_on=batches(2))
    return apex


@pytest.mark.parametrize(
    "trains, budget",
    [("small", b) for b in (None, 0.05, 0.1234, 0.2)] + [("half", b) for b in (0.15, None, 0.777, 0.95)],
)
@pytest.mark.parametrize("options", [{}, {"expand": False}, {"share_operators": False, "operator": "diagonal"}])
def test_a_budget_is_met_to_a_tenth_of_a_point(trains, budget, options):
    model = tiny_model(**FINE)
    total = sum(p.numel() for p in model.parameters())
    apex = begun(model, trains=trains, budget=budget, **options)
    aim = budget or {"half": 0.52, "small": 0.024}[trains]
    # counted afresh, from what an optimizer would get
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == apex.budget.trainable
    assert aim - 0.001 <= trainable / total <= aim + 1e-6
    assert apex.budget.fraction == trainable / total
    assert any(f"{trainable / total:.3%}" in note for note in apex.notes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trains, budget", [("small", 0.2), ("half", 0.7)])
def test_every_family_keeps_within_its_budget(family, trains, budget):
    """Biases, fused projections and tied embeddings are counted once; nothing is smaller than a channel here."""
    model = tiny_model(family)
    total = sum(p.numel() for p in model.parameters())
    apex = begun(model, trains=trains, budget=budget)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == apex.budget.trainable
    channel = 3 * 32
    assert budget * total - channel < trainable <= round(budget * total)


def test_small_stops_at_the_whole_of_n_and_p():
    apex = begun(tiny_model(), trains="small", budget=0.99)
    for name, counts in apex.budget.blocks.items():
        assert (counts.n, counts.p, counts.rest) == (apex.sizes[name], apex.sizes[name], 0)
    assert not apex.budget.followers and not apex.budget.embeddings
    assert apex.budget.fraction < 0.5


def test_half_goes_on_with_the_next_lowest():
    apex = begun(tiny_model(**FINE), trains="half", budget=0.6)
    assert apex.budget.followers and apex.budget.embeddings
    for name, counts in apex.budget.blocks.items():
        assert (counts.n, counts.p) == (apex.sizes[name], apex.sizes[name])
        assert counts.rest > 0


@pytest.mark.parametrize("trains", ["half", "small"])
def test_n_and_p_and_all_layers_take_turns(trains):
    apex = begun(tiny_model(**FINE), trains=trains, budget=0.09)
    channels = [c for name, c in apex.budget.blocks.items() if name.endswith("channels")]
    assert max(c.n for c in channels) - min(c.n for c in channels) <= 1
    assert all(0 <= c.n - c.p <= 1 for c in channels)
    assert 0 < channels[0].n < apex.sizes["layer0_channels"]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 20))
def test_pick(data, components):
    size = data.draw(st.integers(1, components // 2))
    n, p = data.draw(st.integers(0, size)), data.draw(st.integers(0, size))
    rest = data.draw(st.integers(0, components - 2 * size))
    order = data.draw(st.permutations(range(components)))  # highest score first
    choice = Choice(torch.tensor(order[:size]), torch.tensor(order[-size:]), torch.tensor(order))
    lowest = order[::-1]
    expected = {*lowest[:n], *order[:p], *lowest[size:][:rest]}
    picked = Counts(n, p, rest).pick(choice, size).tolist()
    assert picked == sorted(expected)
    assert len(picked) == n + p + rest


def slices_of(apex):
    return {name: (tuple(s.weight.shape), s.index.tolist()) for name, s in apex.slices.slices.items()}


@pytest.mark.parametrize("trains, budget", [("small", 0.15), ("half", 0.6)])
def test_slices_are_the_same_in_every_run_and_as_large_in_every_stage(trains, budget):
    first, again = (begun(tiny_model("qwen2"), stages=2, trains=trains, budget=budget) for _ in range(2))
    assert slices_of(first) == slices_of(again)
    before = slices_of(first)
    first.assess(batches(4, seed=7))
    first.next_stage()
    after = slices_of(first)
    assert {k: shape for k, (shape, _) in before.items()} == {k: shape for k, (shape, _) in after.items()}
    assert before != after  # other components


def test_slices_are_components_chosen_by_score():
    model = tiny_model(num_attention_heads=8, num_key_value_heads=4)
    apex = begun(model, trains="half", budget=0.7)
    heads, channels = apex.anatomy.blocks[:2]
    for block in (heads, channels):
        counts = apex.budget.blocks[block.name]
        expected = set(counts.pick(apex.choices[block.name], apex.sizes[block.name]).tolist())
        for matrix in (*block.mixed, *block.followers):
            found = apex.slices.slice_of(matrix.module)
            width = matrix.slots * matrix.width
            assert {i // width for i in found.index.tolist()} == expected
            assert len(found.index) == len(expected) * width


def untouched(model):
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "apex")
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("trains, what", [("small", "operators"), ("half", "embeddings")])
def test_a_budget_too_small_is_refused(trains, what):
    model = tiny_model()
    with pytest.raises(UserError, match=f"apex.budget.*{what}"):
        Apex(model, ApexConfig(stages=1, trains=trains, budget=0.002))
    untouched(model)


def test_authors_diagonals_need_all_of_n():
    model = tiny_model(**FINE)
    with pytest.raises(UserError, match="authors_diagonals: needs N to train whole"):
        Apex(model, ApexConfig(stages=1, trains="small", budget=0.05, authors_diagonals=True))
    untouched(model)


def test_heads_and_channels_take_turns_too():
    """Of what neither N nor P has, about the same share of both trains."""
    apex = begun(tiny_model(**FINE), trains="half", budget=0.7)
    shares = {}
    for block in apex.anatomy.blocks:
        counts, size = apex.budget.blocks[block.name], apex.sizes[block.name] // block.slots
        between = block.components - 2 * size
        if between:
            shares.setdefault(block.kind, []).append((counts.rest / between, 1 / between))
    for share, step in shares["channels"]:
        assert all(abs(share - other) <= 1.5 * max(step, its) for other, its in shares["heads"])
