"""LIFT: the largest entries after rank reduction train, and nothing else."""

import numpy as np
import pytest
import torch
from sparse_loop import ademamix, assert_close, begun, masked_training, plain_copy, run_config, train, weights
from tiny_models import FAMILIES, batches, tiny_model
from torch import nn

from graftlm.errors import UserError
from graftlm.methods import make_method
from graftlm.methods.lift import low_rank
from graftlm.methods.sparse_settings import LiftSettings

SETTINGS = LiftSettings(share=0.1, rank=4, interval=0)


def linears(model) -> dict[str, torch.Tensor]:
    return {f"{n}.weight": m.weight.detach() for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and ".layers." in n}  # fmt: skip


def oracle(weight: torch.Tensor, share: float, rank: int) -> torch.Tensor:
    """numpy's SVD in float64, and a sort."""
    u, s, v = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    near = np.abs(u[:, :rank] @ np.diag(s[:rank]) @ v[:rank])
    mask = np.zeros(near.size, dtype=bool)
    mask[np.argsort(-near.flatten())[: round(share * near.size)]] = True
    return torch.from_numpy(mask.reshape(near.shape))


def masks(model, method) -> dict[str, torch.Tensor]:
    found = {}
    for name in method.layers:
        mask = torch.zeros_like(model.get_submodule(name).weight, dtype=torch.bool)
        mask.view(-1)[method._entries(name).index.long()] = True
        found[f"{name}.weight"] = mask
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_is_that_of_an_svd_and_only_it_moves(family):
    model = tiny_model(family)
    before = weights(model)
    expected = {name: oracle(w, 0.1, 4) for name, w in linears(model).items()}
    method, optimizer = begun(model, "lift", lift=SETTINGS, options={"lr": 0.1, "weight_decay": 0.1})
    found = masks(model, method)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    train(method, optimizer, batches(2))
    method.finish()
    for name, value in weights(model).items():
        moved = value != before[name]
        assert torch.equal(moved, expected.get(name, torch.zeros_like(moved))), name
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family, changes", [("llama", {}), ("qwen2", {"tie_word_embeddings": True}), ("phi3", {})])
def test_equals_masked_training(family, changes):
    model = tiny_model(family, **changes)
    reference = plain_copy(model)
    data = batches(8, rows=3)
    method, optimizer = begun(model, "lift", lift=SETTINGS)
    mask = masks(model, method)
    train(method, optimizer, data, accumulate=2)
    method.finish()
    masked_training(reference, data, lambda _step, _gradients: mask, accumulate=2)
    assert_close(model, reference)


def test_state_is_no_larger_than_what_trains():
    model = tiny_model()
    method, optimizer = begun(model, "lift", lift=SETTINGS)
    train(method, optimizer, batches(1))
    moments = sum(v.numel() for s in optimizer.state.values() for k, v in s.items() if k == "exp_avg")
    assert moments == method.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith("lift.")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_choice_takes_state_and_values_along(dtype):
    model = tiny_model(dtype=dtype)
    settings = LiftSettings(share=0.3, rank=2, interval=3)
    method, optimizer = begun(model, "lift", lift=settings, options={"lr": 0.05})
    name = method.layers[0]
    entries = method._entries(name)

    def dense() -> dict[str, torch.Tensor]:
        """Values and moments, each at its place in the matrix; NaN where nothing trains."""
        state = optimizer.state[entries.values]
        parts = {"values": entries.values.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        found = {}
        for key, value in parts.items():
            found[key] = torch.full((method._layer(name).weight.numel(),), float("nan"))
            found[key][entries.index.long()] = value
        return found

    train(method, optimizer, batches(2))
    index = entries.index.clone()
    kept = {}

    def each(_step):
        kept["weight"] = method._layer(name).weight.detach().clone()

    # The third step, after which entries are chosen anew, with its choice taken apart.
    plain = type(method).choose
    type(method).choose = lambda self, step: kept.update(dense())
    try:
        train(method, optimizer, batches(1, seed=5), first=3, each=each)
    finally:
        type(method).choose = plain
    weight = method._layer(name).weight.detach().clone()
    method.choose(3)
    now = dense()
    assert not torch.equal(entries.index, index)
    old, new = ~kept["values"].isnan(), ~now["values"].isnan()
    stay, come = old & new, new & ~old
    assert stay.any() and come.any() and int(old.sum()) == int(new.sum())
    for key in ("values", "exp_avg", "exp_avg_sq"):
        assert torch.equal(now[key][stay], kept[key][stay])
    assert torch.equal(now["values"][come], weight.flatten()[come].float())
    assert not now["exp_avg"][come].any() and not now["exp_avg_sq"][come].any()
    assert torch.equal(method._layer(name).weight, weight)


def test_moments_that_lie_in_one_tensor_move_too():
    """AdEMAMix's two first ones."""
    settings = LiftSettings(share=0.3, rank=2, interval=0)
    method, optimizer = begun(tiny_model(), "lift", lift=settings, optimizer=ademamix, options={"lr": 0.05})
    train(method, optimizer, batches(2))
    entries, weight = method._entries(method.layers[0]), method._layer(method.layers[0]).weight
    state = optimizer.state[entries.values]

    def dense() -> torch.Tensor:
        """All three moments, each entry at its place in the matrix; NaN where nothing trains."""
        found = torch.full((3, weight.numel()), float("nan"))
        found[:, entries.index.long()] = torch.stack([*state["state1"], state["state2"]])
        return found

    before, mask = dense(), torch.zeros(weight.numel(), dtype=torch.bool)
    mask[: len(entries.index)] = True
    entries.choose(weight, mask.view_as(weight), state)
    after = dense()
    old, new = ~before[0].isnan(), ~after[0].isnan()
    assert torch.equal(new, mask) and (old & new).any() and (new & ~old).any()
    assert before[:, old & new].all() and torch.equal(after[:, old & new], before[:, old & new])
    assert not after[:, new & ~old].any()


def test_the_fast_svd_comes_near():
    weight = tiny_model(hidden_size=64, intermediate_size=96).model.layers[0].mlp.up_proj.weight.detach()
    weight = weight + 0.5 * torch.randn(96, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        4, 64, generator=torch.Generator().manual_seed(1)
    )
    exact, fast = low_rank(weight, 4), low_rank(weight, 4, 4)
    assert (exact - fast).norm() < 0.02 * exact.norm()


def test_choosing_draws_no_global_random_number():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    method, _ = begun(tiny_model(), "lift", lift=LiftSettings(svd_iterations=2, rank=4))
    method.choose(5)
    assert torch.equal(torch.rand(4), expected)


def test_a_budget_is_a_share_of_all_parameters():
    model = tiny_model()
    method = make_method(model, run_config("lift", lift=LiftSettings(budget=0.1)))
    assert method.trainable / sum(p.numel() for p in model.parameters()) == pytest.approx(0.1, rel=0.01)
    short = make_method(tiny_model(num_hidden_layers=1), method.resolved())
    assert short.trainable == method.trainable // 2
    with pytest.raises(UserError, match=r"lift\.budget"):
        make_method(model, run_config("lift", lift=LiftSettings(budget=0.95)))
    for optim in ("adamw_8bit", "paged_adamw_32bit"):
        with pytest.raises(UserError, match=rf"lift\.interval: the state of optim: {optim} cannot move"):
            make_method(model, run_config("lift", optim=optim)).prepare()
