"""Where heads and channels live: checked by what changes in a layer when a component's weights do."""

import pytest
import torch
from tiny_models import FAMILIES, SHAPE, batches, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from graftlm.activations import ActivationRecorder
from graftlm.anatomy import linear, read_anatomy
from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.errors import UserError

WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4}  # 8 * 8 != 32: heads and hidden size cannot be confused
LAYER = 1


def matrix(block, role):
    return next(m for m in (*block.mixed, *block.followers) if m.role == role)


def blocks_of(anatomy, layer=LAYER):
    heads, channels = (next(b for b in anatomy.of_kind(kind) if b.layer == layer) for kind in ("heads", "channels"))
    return heads, channels


@torch.no_grad()
def seen(model, ids, module, *, output=False):
    """Input (or output) of `module` in a forward pass: [tokens, features]."""
    kept = []
    if output:
        handle = model.get_submodule(module).register_forward_hook(lambda _m, _a, y: kept.append(y))
    else:
        handle = model.get_submodule(module).register_forward_pre_hook(lambda _m, a: kept.append(a[0]))
    model(ids)
    handle.remove()
    return kept[0].flatten(0, 1).clone()


def changed(before, after):
    """Features that differ in any token."""
    return set((before != after).any(0).nonzero().flatten().tolist())


@torch.no_grad()
def silence(model, found, component):
    """Zero the component's rows, and their biases."""
    layer = linear(model, found.module)
    index = found.index(torch.tensor([component])).flatten()
    assert found.dim == 0
    layer.weight[index] = 0
    if layer.bias is not None:
        layer.bias[index] = 0


def per_head_norms(model):
    """Without norms over the whole of queries and keys, which would spread a head's change over all heads."""
    for name, _ in list(model.named_modules()):
        if name.endswith(("q_norm", "k_norm")):
            model.set_submodule(name, nn.Identity())
    return model


@pytest.mark.parametrize("role", ["q", "k", "v"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_group_move_its_query_heads_and_nothing_else(family, role):
    ids = batches(1)[0]["input_ids"]
    for component in range(4):
        model = per_head_norms(tiny_model(family, torch.float64, **WIDE).eval())
        heads, _ = blocks_of(read_anatomy(model))
        assert (heads.components, heads.ranked, heads.slots, heads.width) == (4, 8, 2, 8)
        found = matrix(heads, role)
        before = seen(model, ids, matrix(heads, "o").module)
        silence(model, found, component)
        after = seen(model, ids, matrix(heads, "o").module)
        own = matrix(heads, "o").index(torch.tensor([component])).flatten()
        assert changed(before, after) == set(own.tolist())
        assert (after[:, own] == 0).all() == (role == "v")  # no values, no output; no queries or keys, another pattern


@pytest.mark.parametrize("role", ["up", "gate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_channel_move_that_channel_and_nothing_else(family, role):
    ids = batches(1)[0]["input_ids"]
    for component in (0, 5, 23):
        model = tiny_model(family, torch.float64).eval()
        _, channels = blocks_of(read_anatomy(model))
        down = matrix(channels, "down")
        assert down.dim == 1
        assert down.index(torch.tensor([component])).tolist() == [[component]]
        before, gate_before = seen(model, ids, down.module), seen(model, ids, channels.probe, output=True)
        silence(model, matrix(channels, role), component)
        after, gate_after = seen(model, ids, down.module), seen(model, ids, channels.probe, output=True)
        assert changed(before, after) == {component}
        assert (after[:, component] == 0).all()
        assert changed(gate_before, gate_after) == ({component} if role == "gate" else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_components_divide_every_matrix_without_overlap(family):
    model = tiny_model(family, **WIDE)
    rows: dict[tuple[str, int], list[int]] = {}
    for block in read_anatomy(model).blocks:
        for found in (*block.mixed, *block.followers):
            index = found.index(torch.arange(block.components)).flatten().tolist()
            rows.setdefault((found.module, found.dim), []).extend(index)
    for (module, dim), index in rows.items():
        assert sorted(index) == list(range(linear(model, module).weight.shape[dim])), module


def test_fused_projections_hold_their_parts_in_order():
    model = tiny_model("phi3", **WIDE)
    heads, channels = blocks_of(read_anatomy(model))
    parts = {role: matrix(heads, role) for role in "qkv"} | {r: matrix(channels, r) for r in ("gate", "up")}
    assert parts["q"].module == parts["k"].module == parts["v"].module
    assert parts["gate"].module == parts["up"].module
    first = {role: int(part.index(torch.tensor([0])).min()) for role, part in parts.items()}
    assert first == {"q": 0, "k": 64, "v": 96, "gate": 0, "up": 24}


def test_index_lists_slots_first():
    heads, _ = blocks_of(read_anatomy(tiny_model(**WIDE)))
    index = matrix(heads, "o").index(torch.tensor([3, 1]))
    assert index.tolist() == [[*range(48, 56), *range(16, 24)], [*range(56, 64), *range(24, 32)]]


def test_known_families_need_no_note():
    for family in FAMILIES:
        anatomy = read_anatomy(tiny_model(family))
        assert anatomy.notes == ()
        assert anatomy.kinds == ("heads", "channels")
        assert [(b.kind, b.layer) for b in anatomy.blocks] == [(k, i) for i in (0, 1) for k in ("heads", "channels")]


# -- models that do not fit, or not wholly --------------------------------------------------------------------------


def a_step(model):
    """What can be expanded trains."""
    apex = Apex(model, ApexConfig(stages=1, k_heads=0.25, k_channels=0.25))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    apex.start(optimizer, assess_on=batches(1))
    model.train()
    model(**batches(1)[0]).loss.backward()
    apex.pull_back()
    optimizer.step()
    assert all(p.grad is not None for tie in apex.ties for p in tie.parameters())
    apex.finish()


@pytest.mark.parametrize(
    "family, changes",
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    ],
)
def test_a_mixture_of_experts_expands_its_heads(family, changes):
    model = tiny_model(family, **changes)
    anatomy = read_anatomy(model)
    assert anatomy.kinds == ("heads",)
    assert sum("mixture of experts" in note for note in anatomy.notes) == 1
    a_step(model)


def test_layers_without_experts_expand_their_channels_too():
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]}
    model = tiny_model("qwen3_moe", **changes)
    anatomy = read_anatomy(model)
    assert [b.layer for b in anatomy.of_kind("channels")] == [1]
    assert any("mixture of experts" in note for note in anatomy.notes)
    a_step(model)


def test_one_key_value_head_expands_the_channels():
    model = tiny_model(num_key_value_heads=1)
    anatomy = read_anatomy(model)
    assert anatomy.kinds == ("channels",)
    assert [n for n in anatomy.notes if "one key-value head" in n] == list(anatomy.notes)
    a_step(model)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_models_without_gate_and_known_projections_are_refused(family):
    changes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "ffn_dim": 24, "word_embed_proj_dim": 32}
    config = AutoConfig.for_model(family, **{**SHAPE, **changes, "num_key_value_heads": None})
    model = AutoModelForCausalLM.from_config(config)
    try:
        anatomy = read_anatomy(model)
    except UserError as error:
        assert type(model).__name__ in str(error)
        assert "heads:" in str(error) and "channels:" in str(error)
    else:
        pytest.fail(f"{family} should be refused, found {anatomy.kinds}")


def test_a_layout_of_known_names_is_recognised_with_a_note():
    model = tiny_model("granite")
    anatomy = read_anatomy(model)
    assert anatomy.kinds == ("heads", "channels")
    assert len(anatomy.notes) == 1
    assert "granite is not in the table of families" in anatomy.notes[0]
    recorder = ActivationRecorder(model, anatomy, {"heads": 0.25, "channels": 0.25})
    recorder.run(batches(1))
    assert all(recorder.samples.values())
    recorder.close()
    a_step(model)


def test_an_unknown_model_type_of_fused_projections_is_recognised():
    model = tiny_model("phi3")
    model.config.model_type = "someones_fused"
    anatomy = read_anatomy(model)
    assert anatomy.blocks == read_anatomy(tiny_model("phi3")).blocks
    assert "someones_fused" in anatomy.notes[0]


class QuantLinear(nn.Module):
    """Stands for the layers of quantisation libraries, which are no nn.Linear."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.qweight = torch.zeros(1, dtype=torch.int8)


class PackedLinear(nn.Linear):
    """Stands for those that are, and hold packed integers."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("replace", [QuantLinear, PackedLinear])
@pytest.mark.parametrize("role", ["v", "o", "up", "gate", "down"])
def test_quantised_layers_are_refused(replace, role):
    model = tiny_model()
    name = next(m.module for b in read_anatomy(model).blocks for m in b.mixed if m.role == role)
    model.set_submodule(name, replace(linear(model, name)))
    with pytest.raises(UserError, match=f"{name} .*quantised"):
        Apex(model, ApexConfig(stages=1))


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(UserError, match="no list of decoder layers"):
        read_anatomy(nn.Sequential(nn.Linear(2, 2)))


def test_a_pruned_layer_is_read_from_its_weights_not_from_the_config():
    """Depth-wise different widths: the second layer lost two groups and half of its channels."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, **WIDE}))
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    attention.q_proj, attention.o_proj = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    attention.k_proj, attention.v_proj = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False)
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(32, 12), nn.Linear(32, 12), nn.Linear(12, 32)
    anatomy = read_anatomy(model)
    heads, channels = blocks_of(anatomy)
    assert (heads.components, heads.ranked, channels.components) == (2, 4, 12)
    whole_heads, whole_channels = blocks_of(anatomy, layer=0)
    assert (whole_heads.components, whole_heads.ranked, whole_channels.components) == (4, 8, 24)


@pytest.mark.parametrize("family", ["diffllama", "qwen3_next"])
def test_heads_of_another_making_are_left_alone(family):
    """DiffLlama's heads take values of two groups; Qwen3-Next's query projection holds a gate as well."""
    more = {"qwen3_next": {"layer_types": ["full_attention"] * 2, "num_experts": 0, "mlp_only_layers": [0, 1]}}
    model = tiny_model(family, **WIDE, **more.get(family, {}))
    anatomy = read_anatomy(model)
    assert anatomy.kinds == ("channels",)
    assert any(note.startswith("heads: queries, keys and values of a family of its own") for note in anatomy.notes)


def test_layers_with_too_little_to_choose_from_are_left_out():
    model = tiny_model()
    down = next(m for m in model.modules() if getattr(m, "down_proj", None) is not None)
    down.gate_proj, down.up_proj, down.down_proj = nn.Linear(32, 1), nn.Linear(32, 1), nn.Linear(1, 32)
    assert len(list(read_anatomy(model, smallest=1).of_kind("channels"))) == 2
    left = read_anatomy(model)
    assert [block.layer for block in left.of_kind("channels")] == [1]
    assert "channels: one channel, so there is no P and N to choose; in 1 of 2 layers" in left.notes
    Apex(model, ApexConfig(k_heads=0.5), total_steps=3)
