"""Votes and the choice of P and N against naive loops."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm import advantage
from graftlm.advantage import choose, count_of, rank_votes, set_size
from graftlm.anatomy import Block
from graftlm.errors import UserError


def block(components: int, slots: int = 1, kind: str = "heads", layer: int = 3) -> Block:
    return Block(kind, layer, components, components * slots, 4, (), (), "probe")


def highest_first(values: list[float]) -> list[int]:
    """Indices by value; the smaller index counts as the higher where values tie."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


@st.composite
def tables(draw):
    """[samples, n] of a few values, so that ties are everywhere, and a k of which two disjoint sets fit."""
    n = draw(st.integers(2, 12))
    rows = draw(st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1, max_size=6))
    return rows, draw(st.integers(1, n // 2))


@settings(max_examples=100, deadline=None)
@given(tables(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_votes(table, dtype):
    rows, k = table
    naive = [0] * len(rows[0])
    for row in rows:
        order = highest_first(row)
        for i in order[:k]:
            naive[i] += 1
        for i in order[-k:]:
            naive[i] -= 1
    votes = rank_votes(torch.tensor(rows, dtype=dtype), k)
    assert votes.dtype == torch.int64
    assert votes.tolist() == naive
    assert votes.sum() == 0


def test_votes_of_batches_add_up():
    activations = torch.rand(20, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rank_votes(activations[:7], 2) + rank_votes(activations[7:], 2), rank_votes(activations, 2))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 10), st.integers(1, 4))
def test_choice(data, components, slots):
    n = components * slots
    scores = data.draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n))
    size = data.draw(st.integers(1, components // 2))
    # a group's score is the sum of its query heads', which lie side by side
    groups = [sum(scores[c * slots : (c + 1) * slots]) for c in range(components)]
    order = highest_first(groups)
    choice = choose(block(components, slots), torch.tensor(scores), size)
    assert choice.order.tolist() == order
    assert choice.advantageous.tolist() == sorted(order[:size])
    assert choice.disadvantageous.tolist() == sorted(order[-size:])
    assert not set(choice.advantageous.tolist()) & set(choice.disadvantageous.tolist())


@pytest.mark.parametrize(
    "share, n, expected",
    [(0.125, 4, 1), (0.1875, 8, 2), (0.125, 8, 1), (0.125, 3, 1), (0.001, 5, 1), (0.5, 5, 3), (0.25, 10, 3)],
)
def test_counts_round_half_up_and_are_at_least_one(share, n, expected):
    assert count_of(share, n) == expected


@pytest.mark.parametrize("share, groups, effective", [(0.125, 4, 0.25), (0.1875, 8, 0.25), (0.125, 8, 0.125)])
def test_head_counts_round_on_groups(share, groups, effective):
    assert set_size(block(groups, slots=7), share) / groups == effective


@pytest.mark.parametrize("kind, unit", [("heads", "key-value groups"), ("channels", "channels")])
@pytest.mark.parametrize("components", [3, 5, 7, 9, 101])
def test_sets_that_would_overlap(kind, unit, components):
    with pytest.raises(UserError) as caught:
        set_size(block(components, kind=kind), 0.5)
    message = str(caught.value)
    assert f"apex.k_{kind}" in message
    assert "layer 3" in message
    assert f"{components} {unit}" in message
    largest = float(re.search(r"at most ([\d.]+)", message)[1])
    assert set_size(block(components, kind=kind), largest) == components // 2  # the advice works, and is the limit


def test_votes_of_many_modules_in_parts(monkeypatch):
    activations = torch.rand(5, 4, 9, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([True, False, True, True])
    monkeypatch.setattr(advantage, "TOP_K_AT_ONCE", 2 * 4 * 9)
    found = rank_votes(activations, 2, valid)
    for module, votes in zip(activations, found, strict=True):
        assert torch.equal(votes, rank_votes(module[valid].double(), 2))
