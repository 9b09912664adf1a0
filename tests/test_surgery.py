"""Taking components and layers out of a model: against masking, against slicing by hand, in every family."""

import copy
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES as TRAINED
from tiny_models import tiny_model
from torch import Tensor

from graftlm.anatomy import PER_LAYER, decoder_layers, read_anatomy
from graftlm.errors import UserError
from graftlm.masking import masked
from graftlm.parts import component_cost
from graftlm.pruning import surgery
from graftlm.pruning.shapes import LayerShape, shapes_of
from graftlm.pruning.surgery import add_output_biases, keep_components, keep_layers, kept_slices, prunable_blocks

FAMILIES = (*TRAINED, "gemma2")
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model) -> Tensor:
    return model.eval()(IDS, use_cache=False).logits


KEPTS = (
    {"layer0_heads": [1], "layer1_channels": [0, 5, 7]},
    {"layer0_heads": [], "layer1_channels": [], "layer0_channels": [3]},
    {"layer0_heads": [1], "layer1_heads": [0]},
    {"layer0_heads": [], "layer1_heads": []},
)


def tensors(kept) -> dict[str, Tensor]:
    return {name: torch.tensor(sorted(ids), dtype=torch.long) for name, ids in kept.items()}


def without(model, kept) -> Tensor:
    """Logits of `model` when what is not kept is masked."""
    anatomy = read_anatomy(model, smallest=1)
    gone = {}
    for block in anatomy.blocks:
        if block.name in kept:
            ids = torch.tensor([i for i in range(block.components) if i not in kept[block.name]], dtype=torch.long)
            gone[block.name] = (ids[:, None] * block.slots + torch.arange(block.slots)).flatten()
    with masked(model, anatomy, gone):
        return logits(model)


@pytest.mark.parametrize("kept", KEPTS, ids=["some", "nothing", "uniform", "no attention"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "olmo2"])  # its norm is over all heads
def test_the_rest_computes_what_masking_leaves(family, kept):
    model = tiny_model(family)
    want = without(model, kept)
    before = model.num_parameters()
    smaller = keep_components(model, tensors(kept))
    torch.testing.assert_close(logits(smaller), want, rtol=0, atol=5e-6)
    assert smaller.num_parameters() < before
    uniform = set(kept) == {"layer0_heads", "layer1_heads"} and kept["layer0_heads"]
    assert smaller.config.model_type == (family if uniform else PER_LAYER + family)
    for shape, layer in zip(shapes_of(smaller), decoder_layers(smaller)[1], strict=True):
        assert layer.mlp.down_proj.in_features == shape.intermediate_size


def test_norms_over_all_heads_lose_their_share():
    """OLMo2: a norm over all heads at once is then over those that remain, whose weights stay."""
    model = tiny_model("olmo2")
    norm = decoder_layers(model)[1][0].self_attn.q_norm
    norm.weight.data.normal_()
    want = norm.weight[16:].clone()  # of the second group's two heads
    smaller = keep_components(model, {"layer0_heads": torch.tensor([1])})
    assert torch.equal(decoder_layers(smaller)[1][0].self_attn.q_norm.weight, want)


@pytest.mark.parametrize("heads", [(4, 1), (1, 1), (4, 4)], ids=["one group", "one head", "MHA"])
@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_norms_of_one_head_and_of_all(family, heads):
    """A layer's own norms do not tell whether they are over one head or all where there is one group."""
    model = tiny_model(family, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    for block in read_anatomy(model, smallest=1).of_kind("heads"):
        assert [norm.role for norm in block.norms] == (["q_norm", "k_norm"] if family == "olmo2" else [])
        size = 8 * 32 * (2 * heads[0] + 2 * heads[1]) + (8 * (heads[0] + heads[1]) if family == "olmo2" else 0)
        assert component_cost(model, block) * block.components == size
    mixed = keep_components(tiny_model(family), {"layer0_heads": torch.tensor([1])})
    assert {bool(block.norms) for block in read_anatomy(mixed, smallest=1).of_kind("heads")} == {family == "olmo2"}
    costs = {component_cost(mixed, block) for block in prunable_blocks(mixed) if block.kind == "heads"}
    assert len(costs) == 1  # of a group, whatever else its layer has


def test_the_norms_of_a_family_that_is_not_in_the_table_are_known_by_their_length():
    for family, over_all in (("qwen3", False), ("olmo2", True)):
        mixed = keep_components(tiny_model(family), {"layer0_heads": torch.tensor([1])})
        mixed.config.model_type = "unheard_of"
        blocks = read_anatomy(mixed, smallest=1).of_kind("heads")
        assert [bool(block.norms) for block in blocks] == [over_all, over_all]


def test_biases_of_attention_outlive_its_heads():
    kept = {"layer0_heads": []}
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    want = without(model, kept)
    torch.testing.assert_close(logits(keep_components(model, tensors(kept))), want, rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_sliced_by_hand(family):
    model = tiny_model(family, num_key_value_heads=4, num_attention_heads=8, head_dim=4)
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    new = keep_components(model, tensors({"layer0_heads": [0, 3], "layer1_channels": [2, 3, 11]}))
    queries, groups, channels = [*range(8), *range(24, 32)], [*range(4), *range(12, 16)], [2, 3, 11]
    for name, tensor in new.state_dict().items():
        want = old[name]
        if "layers.0.self_attn" in name:
            rows = groups if "k_proj" in name or "v_proj" in name else queries
            want = want[:, rows] if "o_proj" in name else want[rows]
        elif "layers.1.mlp" in name:
            want = want[:, channels] if "down" in name else want[channels]
        assert torch.equal(tensor, want), name
    assert new.model.embed_tokens.weight is new.lm_head.weight or family == "llama"
    for name, parameter in new.named_parameters():
        assert parameter.requires_grad == ("mlp" in name)
        assert parameter.is_contiguous() and parameter.grad is None
    assert not [name for name, parameter in model.named_parameters() if parameter.numel()]


@pytest.mark.parametrize("family", ["phi3", "qwen2", "olmo2"])
def test_slices_say_where_every_parameter_went(family):
    model = tiny_model(family)
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    kept = tensors({"layer0_heads": [1], "layer0_channels": [3, 1], "layer1_channels": [20]})
    slices = kept_slices(model, kept)
    for name, parameter in keep_components(model, kept).named_parameters():
        moved = old[name].index_select(*slices[name]) if name in slices else old[name]
        assert torch.equal(moved, parameter)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(["llama", "phi3", "qwen3"]),
    st.sets(st.integers(0, 3)),
    st.sets(st.integers(0, 23)),
    st.sets(st.integers(0, 3)),
    st.data(),
)
def test_any_sets_in_one_go_or_two(family, heads, channels, second, data):
    def fresh():
        return tiny_model(family, num_attention_heads=4, num_key_value_heads=4)

    kept = {"layer0_heads": heads, "layer1_channels": channels, "layer1_heads": second}
    want = without(fresh(), kept)
    once = keep_components(fresh(), tensors(kept))
    torch.testing.assert_close(logits(once), want, rtol=0, atol=5e-6)
    # first a larger set, then within it, by the numbers that the components then have
    model, places = fresh(), {}
    larger = {name: sorted(ids | data.draw(st.sets(st.integers(0, 3)))) for name, ids in kept.items()}
    for name, ids in kept.items():
        places[name] = [i for i, component in enumerate(larger[name]) if component in ids]
    model = keep_components(model, tensors(larger))
    model = keep_components(model, tensors({name: ids for name, ids in places.items() if larger[name]}))
    assert torch.equal(logits(model), logits(once))
    assert {name: p.shape for name, p in model.named_parameters()} == {n: p.shape for n, p in once.named_parameters()}


def test_the_order_and_number_of_ids_does_not_matter():
    a = keep_components(tiny_model(), {"layer0_channels": torch.tensor([7, 2, 2])})
    b = keep_components(tiny_model(), {"layer0_channels": torch.tensor([2, 7])})
    assert torch.equal(logits(a), logits(b))


def test_heads_that_a_stock_config_refuses():
    """6 heads do not divide a hidden size of 32, which the stock config asks for: then it is no stock model."""
    model = tiny_model(num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    kept = {"layer0_heads": [0, 1, 3], "layer1_heads": [0, 2, 3]}
    want = without(model, kept)
    smaller = keep_components(model, tensors(kept))
    assert smaller.config.model_type == PER_LAYER + "llama"
    assert shapes_of(smaller) == [LayerShape(6, 3, 24)] * 2
    torch.testing.assert_close(logits(smaller), want, rtol=0, atol=5e-6)


def test_a_parameter_dies_when_its_turn_is_over(monkeypatch):
    """No second model is ever held."""
    model = tiny_model()
    old = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    alive = []
    sliced = surgery._sliced

    def watched(tensor, positions):
        alive.append(sum(ref() is not None for ref in old.values()))
        return sliced(tensor, positions)

    monkeypatch.setattr(surgery, "_sliced", watched)
    keep_components(model, {"layer0_channels": torch.tensor([2, 7])})
    assert alive[-1] <= 2 and len(alive) >= len(old)


def test_components_that_do_not_exist():
    with pytest.raises(UserError, match="layer7_heads is no block"):
        keep_components(tiny_model(), {"layer7_heads": torch.tensor([0])})
    with pytest.raises(UserError, match="components 0 to 1"):
        keep_components(tiny_model(), {"layer0_heads": torch.tensor([2])})


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_layers_are_the_model_that_skips_the_others(family):
    model = tiny_model(family, num_hidden_layers=4)
    shorter = copy.deepcopy(model)
    layers = decoder_layers(shorter)[1]
    for gone in (0, 2):  # the residual stream passes by
        layers[gone].forward = lambda hidden_states, *_, **__: hidden_states
    want = logits(shorter)
    kept = keep_layers(model, [3, 1])
    assert type(kept) is type(shorter)
    assert kept.config.num_hidden_layers == 2
    assert torch.equal(logits(kept), want)
    assert [layer.self_attn.layer_idx for layer in decoder_layers(kept)[1]] == [0, 1]
    cached = kept.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(cached, kept.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False))


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "smollm3"])
def test_layer_lists_of_the_config_follow_their_layers(family):
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    window = {"sliding_window": 4, "use_sliding_window": True, "layer_types": types}
    if family == "smollm3":
        window["no_rope_layers"] = [1, 0, 0, 1]
    model = tiny_model(family, num_hidden_layers=4, **window)
    shorter = copy.deepcopy(model)
    for gone in (0, 2):
        decoder_layers(shorter)[1][gone].forward = lambda hidden_states, *_, **__: hidden_states
    kept = keep_layers(model, [1, 3])
    assert kept.config.layer_types == ["full_attention", "full_attention"]
    if family == "smollm3":
        assert kept.config.no_rope_layers == [0, 1]
    assert torch.equal(logits(kept), logits(shorter))
    # of different widths, and with windows
    model = tiny_model(family, num_hidden_layers=4, **window)
    model = keep_components(model, {"layer2_channels": torch.arange(5)})
    shorter = copy.deepcopy(model)
    for gone in (0, 3):
        decoder_layers(shorter)[1][gone].forward = lambda hidden_states, *_, **__: hidden_states
    kept = keep_layers(model, [1, 2])
    assert kept.config.layer_types == ["full_attention", "sliding_attention"]
    assert [shape.intermediate_size for shape in shapes_of(kept)] == [24, 5]
    assert torch.equal(logits(kept), logits(shorter))


def test_layers_that_do_not_exist():
    for wrong in ([], [2], [-1, 0], [0, 0]):
        with pytest.raises(UserError, match="layers 0 to 1"):
            keep_layers(tiny_model(), wrong)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads", [2, 0])
def test_output_biases_are_added(family, heads, tmp_path):
    model = tiny_model(family)
    if not heads:
        model = keep_components(model, {"layer1_heads": torch.arange(0), "layer0_channels": torch.arange(0)})
    bias = torch.randn(32, generator=torch.Generator().manual_seed(5))
    wanted = copy.deepcopy(model)
    layers = decoder_layers(wanted)[1]
    layers[0].mlp.register_forward_hook(lambda _, __, out: out + bias)
    layers[1].self_attn.register_forward_hook(lambda _, __, out: (out[0] + 2 * bias, out[1]))
    want = logits(wanted)
    biased = add_output_biases(model, {0: (None, bias), 1: (bias, None)})
    biased = add_output_biases(biased, {1: (bias, None)})  # again: added
    torch.testing.assert_close(logits(biased), want, rtol=0, atol=2e-5)
    assert all(shape.output_biases for shape in shapes_of(biased))
    biased.save_pretrained(tmp_path)
    again = type(biased).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(again), logits(biased))
    first = add_output_biases(tiny_model(family), {0: (None, bias)})
    assert [shape.output_biases for shape in shapes_of(first)] == [True, False]


def test_biases_for_a_layer_that_does_not_exist():
    with pytest.raises(UserError, match="layer 2"):
        add_output_biases(tiny_model(), {2: (None, None)})
