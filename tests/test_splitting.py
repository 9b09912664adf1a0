"""A stage that starts by splitting: the output stays but for what N gave, the copies part, and what costs too much is
left out."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_loop import ademamix
from tiny_loop import QUARTER, REPEATED, begun, copied, same, train
from tiny_models import FAMILIES, batches, tiny_model

from graftlm.advantage import choose, set_size
from graftlm.anatomy import linear, read_anatomy
from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.errors import UserError
from graftlm.held_out import mean_loss
from graftlm.importance import with_labels
from graftlm.splitting import Splitter, most, split

BATCH = batches(1)[0]


def chosen(model):
    """Block -> Choice, by scores drawn at random."""
    blocks = read_anatomy(model).blocks
    generator = torch.Generator().manual_seed(3)
    share = 0.5  # of two key-value groups
    return [(b, choose(b, torch.rand(b.ranked, generator=generator), set_size(b, share))) for b in blocks]


def without(model, block, choice):
    """Take away all that N contributes."""
    matrix = next(m for m in block.mixed if m.dim == 1)
    weight = linear(model, matrix.module).weight
    with torch.no_grad():
        weight[:, matrix.index(choice.disadvantageous).flatten()] = 0


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "olmo2"])
def test_the_output_is_what_it_was_without_n(family):
    model, oracle = (tiny_model(family, torch.float64).eval() for _ in range(2))
    for block, choice in chosen(model):
        split(model, block, choice, torch.Generator().manual_seed(0))
        without(oracle, block, choice)
    expected = oracle(input_ids=BATCH["input_ids"]).logits
    torch.testing.assert_close(model(input_ids=BATCH["input_ids"]).logits, expected, rtol=1e-9, atol=1e-9)


def test_p_is_shared_unequally_and_nothing_is_lost():
    model = tiny_model()
    block, choice = next((b, c) for b, c in chosen(model) if b.kind == "channels")
    down = next(m for m in block.mixed if m.dim == 1)
    n, p = (down.index(c).flatten() for c in (choice.disadvantageous, choice.advantageous))
    weight = linear(model, down.module).weight
    before = weight.detach().clone()
    split(model, block, choice, torch.Generator().manual_seed(0))
    torch.testing.assert_close(weight[:, n] + weight[:, p], before[:, p])
    share = weight[:, n] / before[:, p]
    assert share.min() >= 0 and share.max() <= 1 and share.std() > 0.2
    rest = [i for i in range(before.shape[1]) if i not in {*n.tolist(), *p.tolist()}]
    assert torch.equal(weight[:, rest], before[:, rest])


def distance(model, block, choice) -> float:
    """Between the rows of N and P of `block` that split made equal."""
    gap = 0.0
    for matrix in (*block.mixed, *block.followers):
        if matrix.dim == 0:
            weight = linear(model, matrix.module).weight
            n, p = (matrix.index(c).flatten() for c in (choice.disadvantageous, choice.advantageous))
            gap += float((weight[n] - weight[p]).detach().square().sum())
    return gap**0.5


@pytest.mark.parametrize("equal", [True, False])
def test_copies_part_only_if_they_are_shared_unequally(equal, monkeypatch):
    """Shared equally, they get the same gradients and stay equal for ever (up to rounding)."""
    model = tiny_model(dtype=torch.float64)
    pairs = chosen(model)
    if equal:
        monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full(size, 0.5))
    for block, choice in pairs:
        split(model, block, choice, torch.Generator().manual_seed(0))
    assert sum(distance(model, *pair) for pair in pairs) == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in REPEATED[:5]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    parted = sum(distance(model, *pair) for pair in pairs)
    assert parted < 1e-6 if equal else parted > 0.1


def test_a_run_splits_at_every_stage_and_learns():
    model = tiny_model()
    apex, optimizer = begun(model, stages=2, start="split", split_tolerance=10.0)
    losses = train(apex, optimizer, REPEATED)
    assert losses[-1] < losses[0]
    assert len([n for n in apex.notes if "splitting" in n]) == 4  # two kinds, two stages
    assert not [n for n in apex.notes if "left out" in n]


def test_a_split_that_costs_too_much_is_left_out():
    runs = []
    for options in ({}, {"start": "split", "split_tolerance": -10.0}):
        model = tiny_model()
        apex, optimizer = begun(model, stages=2, **options)
        losses = train(apex, optimizer, REPEATED)
        runs.append((losses[:6], [n for n in apex.notes if "left out" in n]))
    assert len(runs[1][1]) == 4
    assert runs[0][0][0] == runs[1][0][0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 70), st.data())
def test_most_finds_the_largest_number_that_fits(count, data):
    largest = data.draw(st.integers(0, count))
    tried = []
    assert most(count, lambda n: tried.append(n) or n <= largest) == largest
    assert len(tried) <= 1 + count.bit_length()


def test_layers_whose_weak_are_dead_are_split_and_others_left_alone():
    """As in a model padded with zeros, which plain training can never use."""
    model = tiny_model(num_hidden_layers=3)
    anatomy = read_anatomy(model)
    dead = 6  # of 24 channels, in the second layer
    with torch.no_grad():
        feed_forward = model.model.layers[1].mlp
        for weight in (feed_forward.gate_proj.weight, feed_forward.up_proj.weight, feed_forward.down_proj.weight.T):
            weight[-dead:] = 0
        for layer in (0, 2):  # what their N gives, counts
            model.model.layers[layer].mlp.down_proj.weight *= 30
    before = copied(model.state_dict())
    apex, _ = begun(model, start="split", split_tolerance=1e-4, stages=1)
    after = model.state_dict()
    split_in = {
        block.layer
        for block in anatomy.of_kind("channels")
        for matrix in block.mixed
        if not torch.equal(after[f"{matrix.module}.weight"], before[f"{matrix.module}.weight"])
    }
    assert split_in == {1}
    assert (after["model.layers.1.mlp.down_proj.weight"][:, -dead:].abs().sum(0) > 0).all()
    (note,) = [n for n in apex.notes if "splitting channels" in n]
    assert "left out in 2 of 3 layers; in the others by" in note
    ids = BATCH["input_ids"]
    fresh = tiny_model(num_hidden_layers=3)
    fresh.load_state_dict(before)
    for block in anatomy.of_kind("heads"):  # may have been split
        for matrix in (*block.mixed, *block.followers):
            name = f"{matrix.module}.weight"
            fresh.get_parameter(name).data.copy_(after[name])
    torch.testing.assert_close(model(input_ids=ids).logits, fresh(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_split_that_is_left_out_leaves_every_bit_of_weights_and_moments():
    model = tiny_model()
    apex, optimizer = begun(model, start="split", split_tolerance=10.0)
    train(apex, optimizer, REPEATED[:2])
    apex.fuse()
    apex.splitter._tolerance = -10.0
    weights = copied(model.state_dict())

    def moments():
        own = {name: p for name, p in model.named_parameters() if not name.startswith("apex.")}  # operators begin anew
        states = {name: optimizer.state[p] for name, p in own.items() if p in optimizer.state}
        return {f"{name}.{k}": v for name, state in states.items() for k, v in state.items() if torch.is_tensor(v)}

    before = copied(moments())
    assert any(bool(value.any()) for name, value in before.items() if name.endswith("exp_avg"))
    apex.begin_stage()
    same(weights, model.state_dict())
    same(before, moments())


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_what_is_measured_is_what_the_split_model_loses(family):
    """Without the N of the blocks, in place of splitting them to see."""
    model = tiny_model(family)
    apex, _ = begun(model, start="split", split_tolerance=10.0, stages=1)
    told = [float(re.search(r"by ([+-][0-9.]+) nats", note)[1]) for note in apex.notes if "splitting" in note]
    untouched = tiny_model(family)
    labelled = [with_labels(batch) for batch in apex.splitter._batches]
    assert sum(told) == pytest.approx(mean_loss(model, labelled) - mean_loss(untouched, labelled), abs=2e-4)


def test_processes_get_their_own_batches_back(monkeypatch):
    """Each measures on its own; going on with another number of them, they are dealt out."""
    splitters = [Splitter(tiny_model(), read_anatomy(tiny_model()), 0.1) for _ in range(3)]
    for number, splitter in enumerate(splitters):
        splitter._batches = [{"input_ids": torch.tensor([[10 * number + i]])} for i in range(2)]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)

    def gather(found, own):
        found[:] = [splitter._batches for splitter in splitters]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    states = [splitter.state() for splitter in splitters]
    same(states[0], states[1])
    for world in (3, 2):
        monkeypatch.setattr(dist, "get_world_size", lambda world=world: world)
        seen = []
        for rank in range(world):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            again = Splitter(tiny_model(), read_anatomy(tiny_model()), 0.1)
            again.load_state(states[0])
            seen.append([int(batch["input_ids"]) for batch in again._batches])
        assert seen == ([[0, 1], [10, 11], [20, 21]] if world == 3 else [[0, 20, 11], [10, 1, 21]])


@pytest.mark.parametrize("made_by", [torch.optim.AdamW, ademamix])
def test_moments_follow_the_copies(made_by):
    model = tiny_model("qwen2")  # which has biases on values
    apex, optimizer = begun(model, start="split", split_tolerance=10.0, stages=1, optimizer=made_by)
    train(apex, optimizer, REPEATED[:2])
    for block in apex.anatomy.blocks:
        choice = apex.choices[block.name]
        split(model, block, choice, torch.Generator().manual_seed(0), optimizer)
        for matrix in (*block.mixed, *block.followers):
            n, p = (matrix.index(c).flatten() for c in (choice.disadvantageous, choice.advantageous))
            for parameter in linear(model, matrix.module).parameters():
                if parameter.dim() <= matrix.dim:
                    continue  # a bias of columns is of no component
                state = optimizer.state[parameter]
                # AdEMAMix has its two first moments in one tensor
                for moment in [state["exp_avg"]] if "exp_avg" in state else [*state["state1"], state["state2"]]:
                    copies, originals = (moment.index_select(matrix.dim, places) for places in (n, p))
                    assert copies.abs().sum() > 0 and torch.equal(copies, originals)


def test_it_goes_on_from_a_checkpoint():
    def start(model):
        apex = Apex(model, ApexConfig(stages=2, start="split", split_tolerance=10.0, **QUARTER), total_steps=6)
        return apex, torch.optim.AdamW(model.parameters(), lr=1e-2)

    whole = tiny_model()
    apex, optimizer = start(whole)
    apex.start(optimizer, assess_on=batches(2))
    train(apex, optimizer, REPEATED[:2])
    kept = copied(whole.state_dict()), copied(apex.state_dict()), copy.deepcopy(optimizer.state_dict())
    again = tiny_model()
    again.load_state_dict(kept[0])
    resumed, other = start(again)
    resumed.load_state_dict(kept[1])
    resumed.start(other)
    other.load_state_dict(kept[2])
    for one, its in ((apex, optimizer), (resumed, other)):
        train(one, its, REPEATED[2:6])
        one.finish()
    same(whole.state_dict(), again.state_dict())
    assert apex.splitter.notes == resumed.splitter.notes and len(apex.splitter.notes) == 4


def test_mean_loss_leaves_padding_out():
    model = tiny_model()
    ids = BATCH["input_ids"]
    padded = torch.cat([ids, torch.zeros_like(ids[:, :3])], 1)
    mask = (padded != 0).long()
    expected = float(model(input_ids=ids, labels=ids).loss.detach())
    batch = with_labels({"input_ids": padded, "attention_mask": mask})
    assert mean_loss(model, [batch]) == pytest.approx(expected, rel=1e-5)


def test_heads_under_one_norm_are_not_split():
    """A norm over all heads would change with each of them."""
    model = tiny_model("olmo2")
    before = copied(model.state_dict())
    apex, _ = begun(model, start="split", split_tolerance=10.0, stages=1)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "self_attn" in name)
    assert any(not torch.equal(after[name], before[name]) for name in before if "mlp" in name)
    assert [n for n in apex.notes if "no split of heads" in n]


@pytest.mark.parametrize("wrong", [{"trains": "half"}, {"assessment": "random"}])
def test_refused(wrong):
    with pytest.raises(UserError, match=r"apex\.start: split"):
        ApexConfig(start="split", **wrong)


def test_scale_of_operators_and_kept_moments():
    model = tiny_model()
    apex, optimizer = begun(model, stages=2, operator_scale=3.0, keep_operator_moments=True)
    plain, _ = begun(tiny_model(), stages=2)
    for wide, narrow in zip(apex.ties, plain.ties, strict=True):
        torch.testing.assert_close(wide.operator.D, 3 * narrow.operator.D)
    train(apex, optimizer, REPEATED[:2])
    moments = {id(p): optimizer.state[p]["exp_avg"].clone() for p in apex.container.parameters()}
    apex.next_stage()
    assert all(torch.equal(optimizer.state[p]["exp_avg"], moments[id(p)]) for p in apex.container.parameters())
