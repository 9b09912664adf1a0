"""Pruning by scores: importance of components and layers, sparsities, targets met exactly, on every family."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, batches, nats_and_tokens, tiny_model, unequal_batches
from torch.nn import functional as F

from graftlm.arguments import parameter_count
from graftlm.errors import UserError
from graftlm.fused_loss import fused_where_it_fits
from graftlm.held_out import mean_loss
from graftlm.importance import with_labels
from graftlm.pruning.ablation import ablation
from graftlm.pruning.base import Pruned
from graftlm.pruning.layer_importance import layer_importance, normalised
from graftlm.pruning.layer_sparsity import next_sparsity
from graftlm.pruning.notes import notes_on
from graftlm.pruning.prune import count_parameters, iterate, prune
from graftlm.pruning.settings import METHODS, PruneSettings
from graftlm.pruning.surgery import keep_components, prunable_blocks
from graftlm.pruning.targets import Sizes, apportioned, find_target, sizes_of
from graftlm.pruning.taylor import taylor

IDS = torch.arange(3, 15)[None]


def calibration(iteration: int):
    return batches(2, seed=iteration)


def pruned_by(model, measure=None, allocate=None, iterations=1, **given) -> Pruned:
    def random(model, blocks, batches):
        return {block.name: torch.rand(block.components) for block in blocks}

    return iterate(
        model,
        PruneSettings(**given),
        calibration,
        measure=measure or random,
        allocate=allocate,
        iterations=iterations,
    )


# --- importance of components ----------------------------------------------------------------------------------------


def slow_taylor(model, data) -> dict[str, torch.Tensor]:
    """One number of one component after the other, from autograd's gradients of the mean loss of all tokens."""
    model.eval()
    losses = []
    for batch in data:
        logits = model(input_ids=batch["input_ids"]).logits
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()))
    torch.stack(losses).mean().backward()  # all batches have as many tokens
    found = {}
    for block in prunable_blocks(model):
        scores = torch.zeros(block.components, dtype=torch.float64)
        for matrix in (*block.mixed, *block.followers, *block.norms):
            module = model.get_submodule(matrix.module)
            for component in range(block.components):
                for at in matrix.index(torch.tensor([component])).flatten().tolist():
                    for parameter in (module.weight, getattr(module, "bias", None)):
                        if parameter is None or parameter.dim() <= matrix.dim:
                            continue
                        mine = parameter.select(matrix.dim, at).double() * parameter.grad.select(matrix.dim, at)
                        scores[component] += mine.abs().sum().detach()
        found[block.name] = scores
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2", "phi3"])
def test_taylor_is_what_brute_force_finds(family):
    model, data = tiny_model(family), batches(3)
    expected = slow_taylor(model, data)
    found = taylor(model, prunable_blocks(model), data)
    assert found.keys() == expected.keys()
    for name, scores in found.items():
        assert scores.dtype == torch.float32
        assert torch.allclose(scores.double(), expected[name], rtol=1e-4), name


def test_taylor_sums_gradients_before_it_takes_absolutes():
    model, data = tiny_model(), batches(2)
    together = [{"input_ids": torch.cat([batch["input_ids"] for batch in data])}]
    apart = taylor(model, prunable_blocks(model), data)
    for name, scores in taylor(model, prunable_blocks(model), together).items():
        assert torch.allclose(scores, apart[name], rtol=1e-4)


def test_taylor_leaves_no_trace_and_padding_does_not_count():
    model = tiny_model().train()
    model.lm_head.requires_grad_(False)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    blocks, ids = prunable_blocks(model), batches(1)[0]["input_ids"]
    plain = taylor(model, blocks, [{"input_ids": ids}])
    padded = {"input_ids": F.pad(ids, (0, 3)), "attention_mask": F.pad(torch.ones_like(ids), (0, 3))}
    for name, scores in taylor(model, blocks, [padded]).items():
        assert torch.allclose(scores, plain[name], rtol=1e-4)
    assert required == {name: p.requires_grad for name, p in model.named_parameters()}
    assert model.training and all(p.grad is None for p in model.parameters())
    assert model(input_ids=ids, labels=ids).logits is not None  # its own loss again


def test_a_group_is_credited_with_its_own_query_heads():
    """Query head h belongs to group h // n_rep; h mod n_kv is what published code does, and gives other scores."""
    model = tiny_model()
    data = batches(1)
    found = taylor(model, prunable_blocks(model), data)["layer0_heads"]
    ids = data[0]["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    attention = model.model.layers[0].self_attn

    def products(name: str) -> torch.Tensor:
        weight = getattr(attention, name).weight
        return (weight * weight.grad).abs().detach()

    keys = products("k_proj").view(2, 8, -1).sum((1, 2)) + products("v_proj").view(2, 8, -1).sum((1, 2))
    heads = products("q_proj").view(4, 8, -1).sum((1, 2)) + products("o_proj").view(-1, 4, 8).sum((0, 2))
    right, wrong = keys.clone(), keys.clone()
    for head in range(4):
        right[head // 2] += heads[head]
        wrong[head % 2] += heads[head]
    assert torch.allclose(found, right, rtol=1e-4)
    assert not torch.allclose(found, wrong, rtol=1e-2)


def test_taylor_of_bfloat16_is_held_in_float32():
    """Gradients of a batch are in bfloat16; their sums over batches, and products with the weights, are not."""
    model, data = tiny_model(dtype=torch.bfloat16), batches(8)
    found = taylor(model, prunable_blocks(model), data)
    mlp = model.model.layers[0].mlp
    matrices = {name: getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down")}
    sums = dict.fromkeys(matrices, 0.0)
    tokens = torch.tensor(sum(batch["labels"][:, 1:].numel() for batch in data))
    with fused_where_it_fits(model):
        for batch in data:
            model(**batch, num_items_in_batch=tokens).loss.backward()
            sums = {name: sums[name] + weight.grad.double() for name, weight in matrices.items()}
            model.zero_grad()
    products = {name: (sums[name] * weight.double()).abs().detach() for name, weight in matrices.items()}
    want = products["gate"].sum(1) + products["up"].sum(1) + products["down"].sum(0)
    assert all(scores.dtype == torch.float32 for scores in found.values())
    torch.testing.assert_close(found["layer0_channels"].double(), want, rtol=1e-5, atol=0)


# --- importance of layers --------------------------------------------------------------------------------------------


def test_taylor_of_float16_does_not_lose_small_gradients():
    """Of a mean over many tokens, gradients are below the smallest float16."""
    model = tiny_model(dtype=torch.float16)
    for parameter in model.parameters():
        parameter.data.mul_(0.02 if parameter.dim() == 2 else 1)
    wide = tiny_model()
    wide.load_state_dict(model.state_dict())
    data = batches(1, rows=24)
    want, found = (taylor(one, prunable_blocks(one), data) for one in (wide, model))
    for name, scores in want.items():
        assert float((found[name] / scores - 1).abs().median()) < 0.05


def slow_layer_importance(model, batch, similarity) -> torch.Tensor:
    seen = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        states = model.eval()(**batch, output_hidden_states=True).hidden_states[:-1]
    handle.remove()
    states = [*states, seen[0]]  # transformers' last one is behind the norm
    values = []
    for before, after in pairwise(states):
        total, count = 0.0, 0
        for row in range(before.shape[0]):
            for at in range(before.shape[1]):
                if batch["attention_mask"][row, at]:
                    a, b = before[row, at].double(), after[row, at].double()
                    cosine = float(a @ b / (a.norm() * b.norm()))
                    distance = float((a - b).norm() if similarity == "euclidean" else (a - b).abs().sum())
                    total += -cosine if similarity == "cosine" else distance
                    count += 1
        values.append(total / count)
    mean = sum(values) / len(values)
    most = max(abs(value - mean) for value in values)
    return torch.tensor([(value - mean) / most for value in values])


@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "manhattan"])
def test_layer_importance_is_what_brute_force_finds(similarity):
    model = tiny_model(num_hidden_layers=4)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    batch = {"input_ids": batches(1)[0]["input_ids"], "attention_mask": mask}
    found = layer_importance(model, [batch], similarity)
    assert torch.allclose(found.float(), slow_layer_importance(model, batch, similarity), atol=1e-4)
    assert abs(float(found.mean())) < 1e-9 and float(found.abs().max()) == pytest.approx(1)


def test_layers_that_are_all_alike_have_no_importance():
    assert torch.equal(normalised(torch.full((5,), 0.1, dtype=torch.float64)), torch.zeros(5, dtype=torch.float64))


def test_sparsity_rules_by_hand():
    importance = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    given = {"sparsity": 0.5, "amplitude": 0.02, "iterations": 50}
    before = torch.tensor([0.005, 0.1, 0.985], dtype=torch.float64)
    cumulative = next_sparsity("cumulative", before, importance, iteration=25, **given)
    assert cumulative.tolist() == pytest.approx([0.0, 0.11, 0.99])  # clamped at both ends
    literal = next_sparsity("literal", before, importance, iteration=25, **given)
    assert literal.tolist() == pytest.approx([0.23, 0.25, 0.27])


# --- targets ---------------------------------------------------------------------------------------------------------

SHAPES = st.fixed_dictionaries(
    {
        "hidden_size": st.just(48),  # which 2, 4, 6 and 8 heads divide
        "num_hidden_layers": st.integers(1, 3),
        "num_key_value_heads": st.integers(1, 4),
        "intermediate_size": st.integers(8, 40),
    }
)


@settings(max_examples=20, deadline=None)
@given(
    shape=SHAPES,
    sparsity=st.floats(0.02, 0.9),
    uniform=st.booleans(),
    multiple=st.sampled_from([1, 4]),
    iterations=st.integers(1, 4),
    groups=st.integers(0, 1),
    seed=st.integers(0, 99),
)
@example(  # nothing remains
    shape={"hidden_size": 48, "num_hidden_layers": 1, "num_key_value_heads": 1, "intermediate_size": 8},
    sparsity=0.875,
    uniform=False,
    multiple=4,
    iterations=3,
    groups=0,
    seed=0,
)
def test_the_target_is_met_within_a_step_and_never_exceeded(
    shape, sparsity, uniform, multiple, iterations, groups, seed
):
    heads = 2 * shape["num_key_value_heads"]
    model = tiny_model(**shape, num_attention_heads=heads, seed=seed)
    total, layers = count_parameters(model), shape["num_hidden_layers"]
    given = {"width_multiple": multiple, "min_groups": groups, "min_channels": groups}
    allocated = torch.rand(layers, generator=torch.Generator().manual_seed(seed)).tolist()

    def allocate(progress, scores, importance):
        return {block.name: allocated[block.layer] for block in progress.blocks}

    def run(**size) -> Pruned:
        return pruned_by(
            tiny_model(**shape, num_attention_heads=heads, seed=seed),
            allocate=None if uniform else allocate,
            iterations=iterations,
            **size,
            **given,
        )

    try:
        target = find_target(model, PruneSettings(sparsity=sparsity, **given), uniform=uniform)
    except UserError as error:
        assert "at most sparsity" in str(error)
        return
    wanted = total - target.original + target.budget
    head_cost, channel_cost = 8 * 48 * (2 * 2 + 2), 3 * 48
    each = layers if uniform else 1
    most, least = shape["intermediate_size"] // multiple * multiple, -(-groups // multiple) * multiple
    best = max(
        total - target.original + h * head_cost * each + c * channel_cost * each
        for h in range(groups * layers // each, shape["num_key_value_heads"] * layers // each + 1)
        for c in range(least * layers // each, most * layers // each + 1, multiple)
        if h * head_cost * each + c * channel_cost * each <= target.budget
    )
    for size in ({"sparsity": sparsity}, {"target_parameters": wanted}):
        pruned = run(**size)
        step = channel_cost * multiple * each
        assert pruned.parameters <= wanted
        assert best - pruned.parameters < step
        assert pruned.parameters == count_parameters(pruned.model) == pruned.steps[-1].parameters
        if not prunable_blocks(pruned.model):
            with pytest.raises(UserError, match="no heads and no channels left to remove"):
                prune(pruned.model, PruneSettings(sparsity=0.1), calibration)
        for layer in pruned.shapes:
            assert layer.num_key_value_heads >= groups
            assert layer.intermediate_size % multiple == 0 and layer.intermediate_size >= least
        if uniform:
            assert len(set(pruned.shapes)) == 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_apportioning(data):
    blocks = data.draw(st.integers(1, 6))
    counts = data.draw(st.lists(st.integers(4, 50), min_size=blocks, max_size=blocks))
    step = data.draw(st.sampled_from([1, 2, 4]))
    cost = data.draw(st.integers(1, 30))
    now = [data.draw(st.integers(4, count)) for count in counts]
    sparsity = [data.draw(st.floats(0, 0.99)) for _ in counts]
    sizes = Sizes("channels", tuple(map(str, range(blocks))), tuple(counts), (cost,) * blocks, step, (4,) * blocks)
    budget = data.draw(st.integers(4 * blocks * cost, cost * sum(counts)))
    found = apportioned(sizes, now, sparsity, budget)
    whole = [count // step * step for count in now]
    assert all(4 <= kept <= most and kept % step == 0 for kept, most in zip(found, whole, strict=True))
    assert sizes.parameters(found) <= budget
    assert sizes.parameters(found) > budget - step * cost or list(found) == whole
    for i in range(blocks):  # the same block with a higher sparsity never keeps a step more
        for j in range(blocks):
            if counts[i] == counts[j] and whole[i] == whole[j] and sparsity[i] > sparsity[j]:
                assert found[i] <= found[j] + step


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_uniform_keeps_the_same_of_layers_that_differ_as_far_as_they_have_it(data):
    step, blocks = data.draw(st.sampled_from([1, 4])), data.draw(st.integers(1, 5))
    counts = tuple(data.draw(st.lists(st.integers(4, 40), min_size=blocks, max_size=blocks)))
    costs = tuple(data.draw(st.lists(st.integers(1, 9), min_size=blocks, max_size=blocks)))
    sizes = Sizes("channels", tuple(map(str, range(blocks))), counts, costs, step, (4,) * blocks)
    budget = data.draw(st.integers(sizes.parameters(sizes.least), sizes.parameters(counts)))
    levels = ([min(n, count // step * step) for count in counts] for n in range(4, 41, step))
    best = max((level for level in levels if sizes.parameters(level) <= budget), key=sizes.parameters)
    assert list(apportioned(sizes, counts, None, budget)) == best


@pytest.mark.parametrize("method", ["adapt", "llm-pruner", "flap", "sheared"])
def test_uniform_treats_equal_layers_alike_where_others_are_narrower(method):
    narrow = {"layer0_channels": torch.arange(7), "layer0_heads": torch.arange(1), "layer3_channels": torch.arange(7)}
    model = keep_components(tiny_model(num_hidden_layers=4, intermediate_size=99), narrow)
    asked = PruneSettings(method=method, sparsity=0.2, uniform=True, sheared_steps=1, flap_compensation=False)
    pruned = prune(model, asked, calibration)
    assert [shape.intermediate_size for shape in pruned.shapes[::3]] == [7, 7]
    assert pruned.shapes[1] == pruned.shapes[2] and 7 < pruned.shapes[1].intermediate_size < 99
    assert pruned.shapes[3].num_key_value_heads == pruned.shapes[1].num_key_value_heads
    assert "the layers that it was given differ: what had less than the others keeps all it had" in notes_on(pruned)


def test_channels_make_up_for_heads_that_cannot_be_divided():
    model = tiny_model(intermediate_size=200)
    target = find_target(model, PruneSettings(sparsity=0.2), uniform=True)
    heads, channels = target.sizes
    assert apportioned(heads, heads.counts, None, target.by_kind[0]) == (2, 2)  # 0.8 * 2 is nearer to 2 than to 1
    kept = apportioned(channels, channels.counts, None, target.by_kind[1])[0]
    assert kept == math.floor((target.budget / 2 - 2 * heads.costs[0]) / channels.costs[0])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "olmo2"])  # its norm is over all heads
def test_ablation_is_the_loss_of_a_model_without_the_component(family):
    model, data = tiny_model(family), calibration(0)
    blocks = prunable_blocks(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = ablation(model, blocks, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    labelled = [with_labels(batch) for batch in data]
    whole = mean_loss(model, labelled)
    for block in (blocks[0], blocks[-1]):
        for component in range(block.components):
            kept = torch.tensor([i for i in range(block.components) if i != component], dtype=torch.long)
            without = mean_loss(keep_components(copy.deepcopy(model), {block.name: kept}), labelled)
            assert found[block.name][component] == pytest.approx(without - whole, abs=2e-6)


def test_heads_by_loss_removes_the_group_that_the_model_misses_least():
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4}
    settings = PruneSettings(sparsity=0.25, iterations=1, heads_by="loss")
    rises = ablation(tiny_model(**shape), prunable_blocks(tiny_model(**shape)), calibration(0)[:1])
    pruned, as_method = (
        prune(tiny_model(**shape), one, calibration) for one in (settings, replace(settings, heads_by="method"))
    )
    for name, ids in pruned.kept.items():
        if "heads" in name:
            assert set(ids.tolist()) == set(rises[name].topk(len(ids)).indices.tolist())
        else:
            assert torch.equal(ids, as_method.kept[name])
    # What was switched off while it was measured has not gone into the importance of layers.
    assert pruned.steps[0].layer_importance == as_method.steps[0].layer_importance
    for method in ("flap", "slicegpt", "shortgpt", "sheared"):
        with pytest.raises(UserError, match="heads_by"):
            prune(tiny_model(), PruneSettings(method=method, sparsity=0.25, heads_by="loss"), calibration)


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_step_by_step(family):
    heard = []
    settings = PruneSettings(sparsity=0.4, iterations=6, amplitude=0.1)
    original = tiny_model(family)
    target = find_target(original, settings, uniform=False)
    wanted = count_parameters(original) - target.original + target.budget
    pruned = prune(tiny_model(family), settings, calibration, heard.append)
    assert list(pruned.steps) == heard and len(heard) == 6
    assert wanted - target.sizes[1].one_step < pruned.parameters <= wanted
    before = pruned.original_shapes
    for step in pruned.steps:
        for old, new in zip(before, step.shapes, strict=True):
            assert 1 <= new.num_key_value_heads <= old.num_key_value_heads
            assert 1 <= new.intermediate_size <= old.intermediate_size
        before = step.shapes
        assert step.layer_importance is not None and max(map(abs, step.layer_importance)) == pytest.approx(1)
    # What stayed, taken out of the original at once, is the same model.
    assert pruned.model.dtype == original.dtype
    again = keep_components(original, pruned.kept).eval()
    assert torch.equal(again(input_ids=IDS).logits, pruned.model.eval()(input_ids=IDS).logits)


def test_uniform_is_a_stock_checkpoint_and_one_step_takes_the_weakest():
    model, settings = tiny_model(), PruneSettings(method="llm-pruner", sparsity=0.5)
    scores = taylor(model, prunable_blocks(model), calibration(0))
    pruned = prune(model, settings, calibration)
    assert type(pruned.model).__name__ == "LlamaForCausalLM" and len(pruned.steps) == 1
    assert len(set(pruned.shapes)) == 1 and pruned.steps[0].layer_importance is None
    for name, ids in pruned.kept.items():
        assert set(ids.tolist()) == set(scores[name].topk(len(ids)).indices.tolist())


def test_amplitude_zero_keeps_layers_within_a_component_of_each_other():
    pruned = prune(tiny_model(), PruneSettings(sparsity=0.3, amplitude=0.0, iterations=4), calibration)
    channels = [shape.intermediate_size for shape in pruned.shapes]
    assert max(channels) - min(channels) <= 1


@pytest.mark.parametrize("tenths", range(1, 8))
@pytest.mark.parametrize("method", ["adapt", "llm-pruner", "flap", "sheared"])
def test_as_published_is_the_share_that_was_given(method, tenths):
    """Not that of the parameters it comes to, which are rounded: int(n (1 - s)), in decimals."""
    model = tiny_model("qwen2", intermediate_size=50)
    more = {"adapt": {"amplitude": 0.0}, "flap": {"uniform": True}, "sheared": {"sheared_steps": 1}}.get(method, {})
    settings = PruneSettings(method=method, sparsity=tenths / 10, exact=False, **{"iterations": 1, **more})
    pruned = prune(model, settings, calibration)
    assert {shape.intermediate_size for shape in pruned.shapes} == {50 * (10 - tenths) // 10}


def test_as_published_counts_are_not_corrected():
    settings = PruneSettings(sparsity=0.3, exact=False, uniform=True, iterations=3)
    pruned = prune(tiny_model(), settings, calibration)
    assert [(s.num_key_value_heads, s.intermediate_size) for s in pruned.shapes] == [(1, 16), (1, 16)]  # int(24 * 0.7)
    adaptive = prune(tiny_model(), PruneSettings(sparsity=0.3, exact=False, iterations=3, amplitude=0.2), calibration)
    kept = [shape.intermediate_size for shape in adaptive.shapes]
    sparsity = torch.zeros(2, dtype=torch.float64)
    for step in adaptive.steps:
        importance = torch.tensor(step.layer_importance, dtype=torch.float64)
        sparsity = next_sparsity(
            "cumulative", sparsity, importance, sparsity=0.3, amplitude=0.2, iteration=step.iteration, iterations=3
        )
        assert all(k <= max(1, int(24 * (1 - s))) for k, s in zip(kept, sparsity.tolist(), strict=True))
    assert min(kept) == max(1, min(int(24 * (1 - s)) for s in sparsity.tolist()))


def test_a_layer_may_lose_its_attention_only_where_it_is_allowed_to():
    def allocate(progress, scores, importance):
        return {block.name: 0.99 if block.layer == 0 else 0.0 for block in progress.blocks}

    free = pruned_by(tiny_model(), allocate=allocate, sparsity=0.5, min_groups=0, min_channels=0, iterations=3)
    assert free.shapes[0].num_key_value_heads == 0 and free.shapes[0].intermediate_size == 0
    bound = pruned_by(tiny_model(), allocate=allocate, sparsity=0.5, iterations=3)
    assert bound.shapes[0].num_key_value_heads == 1 and bound.shapes[0].intermediate_size >= 1
    assert torch.isfinite(free.model(input_ids=IDS).logits).all()


def test_controls():
    first = prune(tiny_model(), PruneSettings(method="random", sparsity=0.5), calibration)
    same = prune(tiny_model(), PruneSettings(method="random", sparsity=0.5), calibration)
    other = prune(tiny_model(), PruneSettings(method="random", sparsity=0.5, seed=1), calibration)
    name = "layer1_channels"
    assert torch.equal(first.kept[name], same.kept[name]) and not torch.equal(first.kept[name], other.kept[name])
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    sizes = mlp.gate_proj.weight.abs().sum(1) + mlp.up_proj.weight.abs().sum(1) + mlp.down_proj.weight.abs().sum(0)
    kept = prune(model, PruneSettings(method="magnitude", sparsity=0.5), calibration).kept[name]
    assert set(kept.tolist()) == set(sizes.topk(len(kept)).indices.tolist())
    adaptive = prune(tiny_model(), PruneSettings(method="magnitude", sparsity=0.4, uniform=False), calibration)
    assert adaptive.steps[0].layer_importance is not None  # by a pass of its own: magnitude makes none


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "one of the two"),
        ({"sparsity": 0.2, "target_parameters": 5}, "one of the two"),
        ({"sparsity": 1.2}, "between 0 and 1"),
        ({"sparsity": 0.2, "method": "magic"}, "magic"),
        ({"sparsity": 0.2, "rule": "magic"}, "cumulative, literal"),
        ({"sparsity": 0.2, "preset": "magic"}, "authors-code"),
        ({"sparsity": 0.2, "heads_by": "magic"}, "method, loss"),
        ({"sparsity": 0.2, "iterations": 0}, "at least 1"),
        ({"sparsity": 0.2, "samples": -1}, "samples"),
        ({"sparsity": 0.2, "amplitude": -1.0}, "amplitude"),
        ({"target_parameters": 9, "exact": False}, "give sparsity"),
    ],
)
def test_settings_are_checked(given, says):
    with pytest.raises(UserError, match=says):
        PruneSettings(**given)


def test_presets_and_counts_of_parameters():
    assert PruneSettings(sparsity=0.2).samples == 10
    assert PruneSettings(sparsity=0.2, preset="authors-code").samples == 512
    assert PruneSettings(sparsity=0.2, preset="authors-code", samples=7).samples == 7
    assert PruneSettings(sparsity=0.2).amplitude == 0.02 and PruneSettings(sparsity=0.2).iterations is None
    at_once = PruneSettings(sparsity=0.2, preset="at-once", amplitude=0.0)
    assert (at_once.samples, at_once.iterations, at_once.amplitude) == (64, 1, 0.0)
    assert replace(PruneSettings(sparsity=0.2, preset="at-once"), seed=1).amplitude == 1.0
    for text, count in {"100M": 10**8, "1.5B": 15 * 10**8, "134,515,008": 134515008, "7": 7, "2k": 2000}.items():
        assert parameter_count(text) == count
    for text in ("", "M", "1.5", "-3M", "1e8", "100 MB"):
        with pytest.raises(ValueError, match="100M"):
            parameter_count(text)


def test_targets_that_cannot_be_met_say_what_can():
    model = tiny_model()
    sizes = sizes_of(model, PruneSettings(sparsity=0.1))
    least = count_parameters(model) - sum(one.parameters(one.counts) - one.parameters(one.least) for one in sizes)
    with pytest.raises(UserError, match=f"at most sparsity 0.6964, which leaves {least:,} of") as caught:
        prune(model, PruneSettings(sparsity=0.9), calibration)
    assert "\n" not in str(caught.value)
    assert prune(tiny_model(), PruneSettings(target_parameters=least, iterations=2), calibration).parameters == least
    with pytest.raises(UserError, match="above the model's"):
        prune(model, PruneSettings(target_parameters=10**9), calibration)
    with pytest.raises(
        UserError, match=r"layer 0 has 2 key-value groups, and must keep 3 \(min_groups\); ask for less"
    ):
        prune(model, PruneSettings(sparsity=0.2, min_groups=3), calibration)
    with pytest.raises(UserError, match="24 channels, and must keep 32"):
        prune(model, PruneSettings(sparsity=0.2, width_multiple=32), calibration)


def test_a_family_without_a_per_layer_class_and_a_broken_model():
    with pytest.raises(
        UserError, match="model type granite: pruning does not know its layers; prune a model of llama, "
    ):
        prune(tiny_model("granite"), PruneSettings(sparsity=0.2), calibration)
    for family in ("mixtral", "qwen3_moe"):
        with pytest.raises(UserError, match=f"model type {family}: its FFNs are of experts, which pruning cannot take"):
            prune(tiny_model(family), PruneSettings(sparsity=0.2), calibration)
    model = tiny_model()
    torch.nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, torch.nan)
    with pytest.raises(UserError, match="NaN or Inf"):
        prune(model, PruneSettings(sparsity=0.2), calibration)


@pytest.mark.parametrize("method", METHODS)
def test_code_of_its_own_would_be_lost(method):
    """A checkpoint may have its family's model_type and other code (auto_map)."""
    model = tiny_model()
    model.__class__ = type("Mine", (type(model),), {})
    with pytest.raises(UserError, match="Mine is a class with code of its own"):
        prune(model, PruneSettings(method=method, sparsity=0.2), calibration)


@pytest.mark.parametrize(
    "method", ["adapt", "llm-pruner", "flap", "slicegpt", "shortgpt", "minitron", "sheared", "wina"]
)
def test_a_model_that_computes_nan_is_refused(method):
    model = tiny_model()
    model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = torch.nan
    chosen = PruneSettings(method=method, sparsity=0.5, iterations=1, sheared_steps=2)
    with pytest.raises(UserError, match="NaN or Inf; the model is broken"):
        prune(model, chosen, calibration)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_refuses_an_unknown_family_before_it_measures(method):
    def never(iteration: int):
        raise AssertionError("measured")

    model = tiny_model("stablelm", norm_eps=1e-5)
    with pytest.raises(UserError, match="model type stablelm") as refused:
        prune(model, PruneSettings(method=method, sparsity=0.3), never)
    assert "\n" not in str(refused.value)


def test_taylor_weighs_tokens():
    model = tiny_model().eval()
    found = taylor(model, prunable_blocks(model), unequal_batches())["layer0_channels"]
    counted = [nats_and_tokens(model, batch["input_ids"]) for batch in unequal_batches()]
    (sum(nats for nats, _ in counted) / sum(tokens for _, tokens in counted)).backward()
    mlp = model.model.layers[0].mlp
    by_hand = sum(
        (linear.weight * linear.weight.grad).abs().sum(dim)
        for linear, dim in ((mlp.gate_proj, 1), (mlp.up_proj, 1), (mlp.down_proj, 0))
    )
    torch.testing.assert_close(found, by_hand.detach(), rtol=1e-4, atol=0)


def test_sizes_fall_in_even_steps_on_sequences_of_their_own():
    settings, asked, heard = PruneSettings(sparsity=0.4, iterations=4), [], []
    shape = {"intermediate_size": 200}
    target = find_target(tiny_model(**shape), settings, uniform=False)
    prune(tiny_model(**shape), settings, lambda i: asked.append(i) or batches(2, seed=i), heard.append)
    assert asked == [0, 1, 2, 3]
    total = count_parameters(tiny_model(**shape))
    for step in heard:
        even = total - (target.original - target.budget) * step.iteration / 4
        assert even - 2 * target.sizes[0].one_step - 4 < step.parameters < even + 4


def test_remainders_that_are_larger_are_rounded_up():
    sizes = Sizes("channels", ("a", "b"), (10, 10), (1, 1), 1, (1, 1))
    assert apportioned(sizes, (10, 10), (0.27, 0.23), 15) == (7, 8)
