"""Budgets below 100%: what autograd saves and which gradients exist."""

import copy

import pytest
import torch
from tiny_loop import random_operators
from tiny_models import batches, tiny_model
from torch import nn

from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig

WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 48}
# From operators alone, over part of N and P, to all of N, P and more.
REGIMES = [("small", 0.07), ("small", 0.12), ("small", 0.9), ("half", 0.45), ("half", 0.9)]


def begun(model, trains, budget, **options) -> Apex:
    apex = Apex(model, ApexConfig(stages=1, k_heads=0.25, k_channels=0.25, trains=trains, budget=budget, **options))
    apex.start(torch.optim.AdamW(model.parameters(), lr=1e-2), assess_on=batches(2))
    random_operators(apex)
    return apex


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- memory ---------------------------------------------------------------------------------------------------------


def saved_by_linears(model, batch) -> tuple[dict[str, dict[int, int]], dict[str, int]]:
    """Bytes that autograd saves inside each linear layer, {module: {storage: bytes}}, the model's parameters not
    counted; and the storage of each layer's input."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[str, dict[int, int]] = {}
    inputs: dict[str, int] = {}
    alive: list[torch.Tensor] = []  # or a storage's address could be used twice
    running: list[str] = []
    handles = []

    def pack(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if running and storage.data_ptr() not in own:
            saved[running[-1]][storage.data_ptr()] = storage.nbytes()
        return tensor

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def enter(_module, args, name=name):
                running.append(name)
                saved[name], inputs[name] = {}, args[0].untyped_storage().data_ptr()
                alive.append(args[0])

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch, use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    return saved, inputs


@pytest.mark.parametrize("trains, budget", REGIMES)
@pytest.mark.parametrize("family", ["qwen2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_saves_only_what_trains(family, trains, budget, dtype):
    model = tiny_model(family, dtype, **WIDE)
    apex = begun(model, trains, budget)
    batch = batches(1, rows=3)[0]
    tokens = batch["input_ids"].numel()
    saved, inputs = saved_by_linears(model, batch)
    # What should be saved: columns that train and routed columns at each output projection; elsewhere y_P for each
    # route, and the input whole where any row trains.
    extra: dict[str, int] = {}
    needs_input = {"lm_head"} if trains == "half" else set()
    for block in apex.anatomy.blocks:
        counts, size = apex.budget.blocks[block.name], apex.sizes[block.name]
        components = counts.n + counts.p + counts.rest
        routed = size * block.width if counts.n < size else 0
        beside = components - (counts.n if routed else 0)  # N is saved for the route
        for matrix in (*block.mixed, *(block.followers if trains == "half" else ())):
            elements = matrix.slots * routed if matrix in block.mixed else 0
            if matrix.dim == 1:
                elements += beside * matrix.slots * matrix.width
            elif components:
                needs_input.add(matrix.module)
            extra[matrix.module] = extra.get(matrix.module, 0) + elements * tokens * dtype.itemsize
    for name, storages in saved.items():
        storages = dict(storages)
        if name in needs_input:
            assert storages.pop(inputs[name], None) is not None, f"{name} should save its input as it is"
        assert sum(storages.values()) == extra.get(name, 0), name


def test_rows_that_share_an_input_share_what_they_save():
    model = tiny_model(**WIDE)
    begun(model, "half", 0.9)
    saved, inputs = saved_by_linears(model, batches(1)[0])
    for layer in range(2):
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            whole = [f"model.layers.{layer}.{'mlp' if 'up_proj' in names else 'self_attn'}.{n}" for n in names]
            assert len({inputs[n] for n in whole}) == 1
            assert set().union(*(saved[n] for n in whole)) == {inputs[whole[0]]}


def saved_by(model, batch) -> int:
    """Bytes that autograd saves in a forward pass, the model's parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # which keeps them, or an address could be used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch, use_cache=False).loss.backward()
    return sum(storage.nbytes() for storage in saved.values())


def let_through(model) -> None:
    """Gradients flow through every layer, whatever trains."""
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: output.requires_grad_())


def with_lora(model) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear"), model)


def test_a_model_saves_what_it_needs_anyway_and_what_trains_and_no_more():
    batch = batches(1, rows=3)[0]
    tokens = batch["input_ids"].numel()
    frozen, plain, lora, small = (tiny_model("llama", **WIDE).train() for _ in range(4))
    let_through(frozen.requires_grad_(False))
    with_lora(lora)
    apex = begun(small, "small", 0.12)
    let_through(small)
    added = 0  # values a token
    for block in apex.anatomy.blocks:
        counts, size = apex.budget.blocks[block.name], apex.sizes[block.name]
        assert counts.n < size, "its operator takes its gradient from tokens"
        added += sum(m.slots * size * m.width for m in block.mixed)
        if counts.n + counts.p:
            added += counts.p * sum(m.slots * m.width for m in block.mixed if m.dim == 1)  # N is saved for the operator
            added += small.config.hidden_size  # the input that mixed rows share
        if block.kind == "channels":
            added -= block.components  # the gated product saves its factors; the model's own the activation too
    assert saved_by(small, batch) == saved_by(frozen, batch) + 4 * tokens * added
    assert saved_by(small, batch) < 0.9 * min(saved_by(plain, batch), saved_by(lora, batch))


# -- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains, budget", REGIMES)
@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma"])
def test_the_gradients_that_exist_are_those_that_train(family, trains, budget):
    model = tiny_model(family, **WIDE)
    apex = begun(model, trains, budget)
    model(**batches(1)[0]).loss.backward()
    apex.pull_back()
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"} if trains == "half" else set()
    for name, parameter in model.named_parameters():
        trains_here = name.startswith("apex.") or name in embeddings
        assert (parameter.grad is not None) == trains_here == parameter.requires_grad, name
    assert sum(g.numel() for g in trained(model).values()) == apex.budget.trainable
    for matrix in (m for b in apex.anatomy.blocks for m in (*b.mixed, *b.followers)):
        found = apex.slices.slice_of(matrix.module)
        if found is None:
            continue
        other = model.get_submodule(matrix.module).weight.shape[1 - matrix.dim]
        rows = len(found.index)
        assert found.weight.grad.shape == ((rows, other) if matrix.dim == 0 else (other, rows))
        assert found.bias is None or found.bias.grad.shape == (rows,)


@pytest.mark.parametrize("trains, budget", REGIMES)
def test_checkpointing_gives_the_same_gradients(trains, budget):
    plain = tiny_model("qwen2", torch.float64, **WIDE).train()
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing_enable({"use_reentrant": False})
    for model in (plain, saving):
        apex = begun(model, trains, budget)
        model(**batches(1)[0], use_cache=False).loss.backward()
        apex.pull_back()
    expected, found = trained(plain), trained(saving)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trains, budget", REGIMES)
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_gives_the_same_gradients_to_rounding(trains, budget, inside):
    """`inside`: the backward pass, too, runs under autocast."""
    plain = tiny_model("qwen2", **WIDE).train()
    mixed = copy.deepcopy(plain)
    apexes = [begun(model, trains, budget) for model in (plain, mixed)]
    plain(**batches(1)[0]).loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mixed(**batches(1)[0]).loss
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    for apex in apexes:
        apex.pull_back()
    expected, found = trained(plain), trained(mixed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype == torch.float32
        if not name.endswith("k_proj.bias"):  # whose true gradient is zero
            assert (found[name] - expected[name]).norm() < 0.05 * expected[name].norm(), name


@pytest.mark.parametrize("trains, budget", [("small", 0.12), ("half", 0.45)])
def test_sliced_layers_compile(trains, budget):
    """And still give the right gradients when a stage boundary moved the slices."""
    torch._dynamo.reset()
    plain = tiny_model("llama", torch.float64, num_hidden_layers=1, **WIDE).train()
    other = copy.deepcopy(plain)
    apexes = [begun(model, trains, budget) for model in (plain, other)]
    indices = [s.index for s in apexes[0].slices.slices.values()]
    compiled = torch.compile(other, backend="eager")
    for seed in (1, 2):
        for model, apex in zip((plain, compiled), apexes, strict=True):
            for batch in batches(2, seed=seed):
                (model(**batch).loss / 2).backward()
            apex.pull_back()
        expected, found = trained(plain), trained(other)
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
        for apex in apexes:
            apex.model.zero_grad()
            apex.next_stage()
    moved = [s.index for s in apexes[0].slices.slices.values()]
    assert any(not torch.equal(now, then) for now, then in zip(moved, indices, strict=True))


def test_slices_train_in_float32_where_the_model_is_bfloat16():
    """Steps too small for bfloat16 add up, and the model holds the effective weights rounded once."""
    model = tiny_model("qwen2", torch.bfloat16, **WIDE).train()
    apex = Apex(model, ApexConfig(stages=1, trains="small", budget=0.12, k_heads=0.25, k_channels=0.25))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0)
    apex.start(optimizer, assess_on=batches(2))
    random_operators(apex)
    slices = apex.slices.slices
    before = {name: found.weight.detach().clone() for name, found in slices.items()}
    for batch in batches(8):
        model(**batch).loss.backward()
        apex.pull_back()
        optimizer.step()
        optimizer.zero_grad()
    assert any(apex.budget.blocks[e.block.name].n for e in apex.expansions)
    for name, found in slices.items():
        assert found.weight.dtype == torch.float32
        moved = (found.weight - before[name]).abs().max()
        assert 2e-5 < moved < 1e-4 < torch.finfo(torch.bfloat16).eps * before[name].abs().max()
    for expansion in apex.expansions:
        for mixed in expansion.mixed():
            found = apex.slices.slice_of(mixed.piece.matrix.module)
            n, p = mixed.placed.n, mixed.placed.p
            raw = mixed.raw_n()
            assert raw.dtype == torch.float32
            effective = raw + mixed.tie.operator.matrix() @ p.take(mixed.weight).float()
            torch.testing.assert_close(n.take(mixed.weight), effective.bfloat16(), rtol=2**-8, atol=0)
            if found is None:
                continue
            values = found.bias[:, None] if mixed.weight.dim() == 1 else found.weight
            values = values.T if mixed.piece.dim == 1 else values  # [trained, other]
            for place, panel in ((n, raw), (p, p.take(mixed.weight))):
                at = found.places[place.index]  # [slots, k]
                expected = values[at[at >= 0]]
                assert torch.equal(panel[at >= 0], expected if panel is raw else expected.bfloat16())


def test_a_stage_boundary_moves_the_slices_and_not_the_model():
    model = tiny_model("qwen2", **WIDE).train()
    apex = Apex(model, ApexConfig(stages=2, trains="small", budget=0.2, k_heads=0.25, k_channels=0.25), total_steps=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    apex.start(optimizer, assess_on=batches(2))
    boundaries = []
    for batch in batches(8):
        model(**batch).loss.backward()
        apex.pull_back()
        optimizer.step()
        optimizer.zero_grad()
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        boundaries.append(apex.advance())
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        if boundaries[-1]:
            for name, found in apex.slices.slices.items():
                layer = model.get_submodule(name.replace("-", "."))
                assert torch.equal(found.weight, layer.weight.index_select(found.dim, found.index))
                assert found.weight not in optimizer.state
    assert boundaries == [False] * 3 + [True] + [False] * 4
    before = tiny_model("qwen2", **WIDE)
    for name, parameter in before.named_parameters():
        now = model.get_parameter(name)
        if "proj" not in name or "q_proj" in name or "k_proj" in name:
            assert torch.equal(parameter, now), f"{name} does not train in small"
