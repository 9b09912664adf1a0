"""The methods that Adapt-Pruner is compared with: each one's defining property, by hand."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, batches, tiny_model

from graftlm.anatomy import linear
from graftlm.errors import UserError
from graftlm.parts import count_parameters
from graftlm.pruning.base import Calibration
from graftlm.pruning.inputs import watch_inputs
from graftlm.pruning.methods.flap import Moments, compensation, fluctuation, input_moments
from graftlm.pruning.methods.minitron import activation
from graftlm.pruning.methods.wina import wina
from graftlm.pruning.per_layer_modeling import output_biases
from graftlm.pruning.prune import prune
from graftlm.pruning.ranking import ranked_counts
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.surgery import keep_components, prunable_blocks
from graftlm.pruning.targets import Sizes, asked_parameters

CONTROLS = ("flap", "shortgpt", "minitron", "wina")
PADDED = {
    "input_ids": torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
}


def calibration(rows: int = 4) -> Calibration:
    return lambda iteration: batches(2, rows=rows, seed=iteration + 1)


def seen_inputs(model, data) -> dict[str, list[torch.Tensor]]:
    """By block, the inputs of its output projection at every token: [tokens, columns], a list over sequences."""
    found: dict[str, list[torch.Tensor]] = {}

    def before(name):
        return lambda _, args: found.setdefault(name, []).append(args[0].detach())

    handles = [
        model.get_submodule(b.output.module).register_forward_pre_hook(before(b.name)) for b in prunable_blocks(model)
    ]
    for batch in data:
        for ids, mask in zip(
            batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"])), strict=True
        ):
            model(ids[mask.bool()][None])  # each sequence alone, without its padding
    for handle in handles:
        handle.remove()
    return {name: [rows[0] for rows in parts] for name, parts in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_by_hand(family):
    model = tiny_model(family)
    data = [*batches(2), PADDED]
    seen = seen_inputs(model, data)
    blocks = prunable_blocks(model)
    moments = input_moments(model, blocks, data)
    found_wina, found_minitron = wina(model, blocks, data), activation(model, blocks, data)
    for block in blocks:
        weight = linear(model, block.output.module).weight.detach()
        rows = torch.cat(seen[block.name])
        width = block.slots * block.width
        of_columns = rows.abs().mean(0) * weight.norm(dim=0)
        by_hand = [of_columns[c * width : (c + 1) * width].sum() for c in range(block.components)]
        torch.testing.assert_close(found_wina[block.name], torch.stack(by_hand), rtol=1e-4, atol=1e-6)

        means = torch.stack([
            torch.stack([part.unflatten(1, (-1, block.width)).norm(dim=2).mean(0)]) for part in seen[block.name]
        ])  # fmt: skip
        heads = means.squeeze(1).norm(dim=0)
        by_hand = [heads[c * block.slots : (c + 1) * block.slots].sum() for c in range(block.components)]
        torch.testing.assert_close(found_minitron[block.name], torch.stack(by_hand), rtol=1e-4, atol=1e-6)

        metric = rows.double().var(0) * weight.double().square().sum(0)
        standard = (metric - metric.mean()) / metric.std()
        by_hand = [standard[c * width : (c + 1) * width].mean() for c in range(block.components)]
        torch.testing.assert_close(
            fluctuation(model, block, moments[block.name]).double(), torch.stack(by_hand), rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(moments[block.name].mean, rows.double().mean(0), rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 9))
def test_moments_in_parts_are_those_of_the_whole(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 3, generator=generator, dtype=torch.float64) * 10 + 100 for n in lengths]
    moments = Moments(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    for part in parts:
        moments.add(part)
    whole = torch.cat(parts)
    torch.testing.assert_close(moments.mean, whole.mean(0))
    expected = whole.var(0) if len(whole) > 1 else torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(moments.variance, expected)


def test_padding_does_not_count():
    model = tiny_model()
    short = {"input_ids": PADDED["input_ids"][:1, :3]}
    padded = {key: value[:1] for key, value in PADDED.items()}
    blocks = prunable_blocks(model)
    for measure in (wina, activation):
        alone, with_padding = measure(model, blocks, [short]), measure(model, blocks, [padded])
        for name in alone:
            torch.testing.assert_close(alone[name], with_padding[name], rtol=1e-4, atol=1e-6)


def test_watching_leaves_the_model_as_it_was():
    model = tiny_model().train()
    watch_inputs(model, prunable_blocks(model), batches(1), lambda block, inputs, mask: None)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", CONTROLS)
def test_a_target_is_met_from_below(family, method):
    model = tiny_model(family, num_hidden_layers=4)
    original = sum(p.numel() for p in model.parameters())
    heard = []
    pruned = prune(model, PruneSettings(method=method, target_parameters=original - 7000), calibration(), heard.append)
    assert pruned.parameters == sum(p.numel() for p in pruned.model.parameters()) <= original - 7000
    assert pruned.original_parameters == original
    assert [step.parameters for step in heard] == [pruned.parameters]
    assert torch.isfinite(pruned.model(batches(1)[0]["input_ids"]).logits).all()
    if method == "flap":  # a step is a channel
        assert pruned.parameters > original - 7000 - 3 * model.config.hidden_size
    assert set(pruned.kept) == {f"layer{i}_{kind}" for i in range(4) for kind in ("heads", "channels")}


@pytest.mark.parametrize("method", CONTROLS)
def test_a_sparsity_asks_the_same_of_every_method(method):
    model = tiny_model(num_hidden_layers=4)
    blocks = 4 * (2 * (2 + 2 + 1 + 1) * 8 + 3 * 24) * 32
    total = sum(p.numel() for p in model.parameters())
    chosen = PruneSettings(method=method, sparsity=0.5)
    assert asked_parameters(model, chosen) == total - blocks + blocks // 2
    assert prune(model, chosen, calibration()).parameters <= total - blocks // 2


def test_flap_replaces_constants_exactly():
    """Inputs of the output projections that never change lose nothing when they become a bias."""
    model = tiny_model(num_hidden_layers=3, dtype=torch.float64)
    ids = torch.full((2, 6), 9)  # one token, without positions to tell: attention and FFN see the same everywhere
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    before = model(ids).logits.detach()
    pruned = prune(model, PruneSettings(method="flap", sparsity=0.5), lambda iteration: [{"input_ids": ids}])
    assert pruned.parameters < pruned.original_parameters
    torch.testing.assert_close(pruned.model(ids).logits, before, rtol=0, atol=1e-6)  # norms are in float32
    model = tiny_model(num_hidden_layers=3, dtype=torch.float64)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    without = PruneSettings(method="flap", sparsity=0.5, flap_compensation=False)
    bare = prune(model, without, lambda iteration: [{"input_ids": ids}])
    assert (bare.model(ids).logits - before).abs().max() > 1e-3
    assert not any(shape.output_biases for shape in bare.shapes)


def test_flap_compensation_is_the_mean_of_what_went():
    model = tiny_model()
    data = batches(3)
    blocks = prunable_blocks(model)
    moments, seen = input_moments(model, blocks, data), seen_inputs(model, data)
    for block in blocks:
        kept = torch.tensor([0]) if block.kind == "heads" else torch.tensor([1, 5, 6])
        width = block.slots * block.width
        rows, weight = torch.cat(seen[block.name]).double(), linear(model, block.output.module).weight.double()
        by_hand = torch.zeros(32, dtype=torch.float64)
        for component in range(block.components):
            if component not in kept:
                columns = slice(component * width, (component + 1) * width)
                by_hand += weight[:, columns] @ rows[:, columns].mean(0)
        torch.testing.assert_close(
            compensation(model, block, moments[block.name], kept), by_hand.detach(), rtol=1e-4, atol=1e-6
        )


def test_flap_removes_what_has_the_least_score_anywhere():
    model = tiny_model(num_hidden_layers=3)
    blocks = prunable_blocks(model)
    scores = {b.name: fluctuation(model, b, input_moments(model, blocks, calibration()(0))[b.name]) for b in blocks}
    pruned = prune(model, PruneSettings(method="flap", sparsity=0.4, min_groups=0), calibration())
    stay, go = [], []
    for name, values in scores.items():
        kept = set(pruned.kept[name].tolist())
        if name.endswith("channels"):
            stay += [float(v) for i, v in enumerate(values) if i in kept]
            go += [float(v) for i, v in enumerate(values) if i not in kept]
    assert go and max(go) <= min(stay)
    assert len({len(pruned.kept[b.name]) for b in blocks if b.kind == "channels"}) > 1  # layers differ


def test_flap_counts_its_biases_among_what_must_stay():
    settings = PruneSettings(method="flap", sparsity=0.69)
    with pytest.raises(UserError, match=r"sparsity 0.69 is more.* leaves 7,648 of 15,008 .*128 of them biases"):
        prune(tiny_model(), settings, calibration())
    least = prune(tiny_model(), PruneSettings(method="flap", target_parameters=7_648), calibration())
    assert least.parameters == 7_648
    assert prune(tiny_model(), replace(settings, flap_compensation=False), calibration()).parameters < 7_648


@pytest.mark.filterwarnings("error")
def test_flap_of_layers_that_lose_all_heads_warns_of_nothing():
    chosen = PruneSettings(method="flap", sparsity=0.97, min_groups=0, min_channels=0)
    pruned = prune(tiny_model(intermediate_size=99), chosen, calibration())
    assert {shape.num_key_value_heads for shape in pruned.shapes} == {0}
    assert torch.isfinite(pruned.model(batches(1)[0]["input_ids"]).logits).all()


def test_flap_uniform_is_stock_without_compensation():
    chosen = PruneSettings(method="flap", sparsity=0.5, uniform=True, flap_compensation=False)
    pruned = prune(tiny_model(), chosen, calibration())
    assert type(pruned.model).__name__ == "LlamaForCausalLM"
    assert len(set(pruned.shapes)) == 1


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 2), st.floats(0.3, 1.0))
def test_ranked_counts_against_trying_all(seed, step, floor, share):
    generator = torch.Generator().manual_seed(seed)
    lengths = [2, 3]
    heads = Sizes("heads", ("h0", "h1"), (2, 2), (11, 11), 1, (min(floor, 1),) * 2)
    channels = Sizes("channels", ("c0", "c1"), (lengths[0] * step, lengths[1] * step + 1), (3, 3), step, (0, step))
    scores = {
        name: torch.rand(n, generator=generator)
        for one in (heads, channels)
        for name, n in zip(one.names, one.counts, strict=True)
    }
    whole = sum(one.parameters(one.counts) for one in (heads, channels))
    least = sum(one.parameters(one.least) for one in (heads, channels))
    budget = max(least, math.floor(whole * share))
    counts = ranked_counts((heads, channels), scores, budget)
    spent = sum(one.parameters([counts[name] for name in one.names]) for one in (heads, channels))
    assert spent <= budget
    for one in (heads, channels):
        for name, most, low, cost in zip(one.names, one.most, one.least, one.costs, strict=True):
            assert low <= counts[name] <= most and counts[name] % one.step == 0
            if counts[name] < most:
                assert spent + one.step * cost > budget  # nothing that went fits in again
        went, stayed = [], []
        for name, most, low in zip(one.names, one.most, one.least, strict=True):
            ascending = scores[name].double().sort().values[len(scores[name]) - most :].unflatten(0, (-1, one.step))
            going = (most - counts[name]) // one.step
            went += ascending[:going].mean(1).tolist()
            stayed += ascending[going : (most - low) // one.step].mean(1).tolist()  # and might have gone
        assert not went or not stayed or max(went) <= min(stayed)  # of one price, the weakest


def test_shortgpt_removes_the_layers_that_do_least():
    model = tiny_model(num_hidden_layers=6)
    data = calibration()(0)
    states = [torch.cat(parts) for parts in zip(*(_layer_states(model, batch) for batch in data), strict=True)]
    influence = [
        1 - torch.cosine_similarity(before, after, dim=-1).mean() for before, after in itertools.pairwise(states)
    ]
    order = sorted(range(6), key=lambda i: float(influence[i]))
    pruned = prune(model, PruneSettings(method="shortgpt", sparsity=0.4), calibration())
    gone = {i for i in range(6) if not len(pruned.kept[f"layer{i}_heads"])}
    assert gone == set(order[:3])  # two layers are a third, which is less than asked for
    assert all(not len(pruned.kept[f"layer{i}_channels"]) for i in gone)
    assert len(pruned.shapes) == 3 and type(pruned.model).__name__ == "LlamaForCausalLM"
    assert pruned.steps[0].layer_importance is not None
    assert "below what was asked for" in pruned.notes[0]


def _layer_states(model, batch) -> list[torch.Tensor]:
    """Inputs of every layer and the last one's output: [B, S, hidden size] each."""
    states: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0].detach())) for layer in model.model.layers
    ]
    handles.append(model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0].detach())))
    model(batch["input_ids"])
    for handle in handles:
        handle.remove()
    return states


def test_shortgpt_computes_what_the_kept_layers_compute():
    model = tiny_model(num_hidden_layers=4)
    reference = tiny_model(num_hidden_layers=4)
    pruned = prune(model, PruneSettings(method="shortgpt", sparsity=0.5), calibration())
    kept = [i for i in range(4) if len(pruned.kept[f"layer{i}_heads"])]
    for index, layer in enumerate(list(reference.model.layers)):
        layer.self_attn.layer_idx = index
    reference.model.layers = torch.nn.ModuleList(reference.model.layers[i] for i in kept)
    reference.config.num_hidden_layers = len(kept)
    ids = batches(1)[0]["input_ids"]
    assert torch.equal(pruned.model(ids, use_cache=False).logits, reference(ids, use_cache=False).logits)


@pytest.mark.parametrize("method", [*CONTROLS, "slicegpt", "sheared"])
def test_bfloat16_and_models_whose_layers_differ(method):
    settings_of = PruneSettings(method=method, sparsity=0.3, sheared_steps=2)
    pruned = prune(tiny_model(num_hidden_layers=4, dtype=torch.bfloat16), settings_of, calibration())
    assert {p.dtype for p in pruned.model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(pruned.model(batches(1)[0]["input_ids"]).logits).all()
    first = PruneSettings(method="flap", sparsity=0.5, min_groups=0)
    differ = prune(tiny_model(num_hidden_layers=4), first, calibration()).model
    if method == "slicegpt":
        with pytest.raises(UserError, match="per_layer_llama"):
            prune(differ, settings_of, calibration())
        return
    again = prune(differ, settings_of, calibration())
    assert again.parameters < again.original_parameters
    assert torch.isfinite(again.model(batches(1)[0]["input_ids"]).logits).all()


def test_biases_that_are_there_are_not_counted_again():
    """Where a first FLAP has left layers without heads, whose projection is a bias alone."""
    first = PruneSettings(method="flap", sparsity=0.5, min_groups=0)
    once = prune(tiny_model(num_hidden_layers=4), first, calibration())
    empty = {"layer0_heads": torch.tensor([], dtype=torch.int64), "layer1_heads": torch.tensor([], dtype=torch.int64)}
    model = keep_components(once.model, empty)
    assert output_biases(model.model.layers[0])[0] is not None
    target = count_parameters(model) - 500
    again = prune(model, PruneSettings(method="flap", target_parameters=target, min_groups=0), calibration())
    assert target - 3 * model.config.hidden_size < again.parameters <= target


@pytest.mark.parametrize("method", ["flap", "shortgpt", "slicegpt", "sheared"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"iterations": 5, "sparsity": 0.3}, "one step"),
        ({"target_parameters": 10**9}, "above the model's"),
        ({"target_parameters": 100}, "ask for"),
    ],
)
def test_bad_targets_are_refused_in_one_line(method, change, says):
    with pytest.raises(UserError, match=says) as refused:
        prune(tiny_model(), PruneSettings(method=method, **change), calibration())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", ["flap", "shortgpt", "slicegpt", "sheared"])
def test_a_sparsity_as_published_is_of_what_the_method_counts(method):
    """Of 5 layers, 20 channels, a hidden size: int(n (1 - s)) stay, whatever that is in parameters."""
    model = tiny_model(num_hidden_layers=5, intermediate_size=20)
    hidden, groups = model.config.hidden_size, model.config.num_key_value_heads
    asked = PruneSettings(method=method, sparsity=0.4, exact=False, sheared_steps=2)
    wanted = asked_parameters(model, asked)
    pruned = prune(model, asked, calibration())
    assert torch.isfinite(pruned.model(batches(1)[0]["input_ids"]).logits).all()
    if method == "shortgpt":
        assert len(pruned.shapes) == 3 and "below what was asked for" not in pruned.notes[0]
    elif method == "slicegpt":
        assert pruned.model.config.hidden_size == int(hidden * 0.6)
    elif method == "sheared":
        assert {(s.num_key_value_heads, s.intermediate_size) for s in pruned.shapes} == {(int(groups * 0.6) or 1, 12)}
    else:  # two biases a layer come on top
        assert 0 <= wanted - (pruned.parameters - 2 * 5 * hidden) < 3 * hidden


@pytest.mark.parametrize("method", ["shortgpt", "slicegpt"])
def test_widths_that_no_channel_is_removed_for(method):
    width = tiny_model().config.intermediate_size
    fits = PruneSettings(method=method, sparsity=0.5, width_multiple=width // 2)
    assert {shape.intermediate_size for shape in prune(tiny_model(), fits, calibration()).shapes} == {width}
    with pytest.raises(UserError, match=f"{width} of layer 0 are no multiple of {width - 1}"):
        prune(tiny_model(), replace(fits, width_multiple=width - 1), calibration())


def test_slicegpt_cannot_tell_layers_apart():
    with pytest.raises(UserError, match="the same of all"):
        prune(tiny_model(), PruneSettings(method="slicegpt", sparsity=0.5, uniform=False), calibration())
