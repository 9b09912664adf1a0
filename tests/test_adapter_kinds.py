"""What defines each method with adapters (its source says what it begins as, and what trains)."""

import math

import pytest
import torch
from tiny_adapters import RANK, config, prepared, train
from tiny_models import batches, tiny_model
from transformers.models.llama.modeling_llama import LlamaMLP

from graftlm.errors import UserError
from graftlm.methods import eva
from graftlm.methods.adapters import ADAPTER, targets
from graftlm.methods.lora_ga import LoraGa
from graftlm.methods.sparse_settings import LiftSettings
from graftlm.training.run import train_one


def layers_of(made):
    return made.layers().items()


def test_lora_starts_as_the_base_model_and_scales_by_alpha_over_r():
    data = batches(1)[0]
    base = tiny_model()(**data).logits
    made = prepared("lora", alpha=8.0)
    assert torch.equal(made.model(**data).logits, base)
    assert {layer.scaling[ADAPTER] for _, layer in layers_of(made)} == {8 / RANK}


def test_rslora_scales_by_alpha_over_the_root_of_r():
    assert {layer.scaling[ADAPTER] for _, layer in layers_of(prepared("rslora", alpha=8.0))} == {8 / math.sqrt(RANK)}


def test_dora_magnitudes_are_the_rows_norms_and_train():
    weights = {n: m.weight.clone() for n, m in tiny_model().named_modules() if isinstance(m, torch.nn.Linear)}
    made = prepared("dora")
    magnitudes = {n: layer.lora_magnitude_vector[ADAPTER].weight for n, layer in layers_of(made)}
    assert len(magnitudes) == 14
    for name, magnitude in magnitudes.items():
        torch.testing.assert_close(magnitude, weights[name].norm(dim=1))
    before = {name: value.detach().clone() for name, value in magnitudes.items()}
    train(made.model, batches(2))
    assert all((magnitudes[name] != value).all() for name, value in before.items())
    made.finish()
    for name, value in magnitudes.items():  # the merged weight's rows are so long
        torch.testing.assert_close(made.model.get_submodule(name).weight.norm(dim=1), value)


def test_pissa_takes_the_principal_part():
    data = batches(1)[0]
    base = tiny_model()
    made = prepared("pissa")
    torch.testing.assert_close(made.model(**data).logits, base(**data).logits, rtol=1e-4, atol=1e-4)
    for name, layer in layers_of(made):
        weight = base.get_submodule(name).weight
        u, s, v = torch.linalg.svd(weight)
        principal = u[:, :RANK] @ torch.diag(s[:RANK]) @ v[:RANK]
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        torch.testing.assert_close(layer.scaling[ADAPTER] * b @ a, principal, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.base_layer.weight, weight - principal, rtol=0, atol=1e-4)


def test_pissa_with_a_fast_svd_takes_nearly_as_much():
    data = batches(1)[0]
    base = tiny_model()
    made = prepared("pissa", svd_iterations=16)
    torch.testing.assert_close(made.model(**data).logits, base(**data).logits, rtol=1e-4, atol=1e-4)
    for name, layer in layers_of(made):
        values = torch.linalg.svdvals(base.get_submodule(name).weight)
        assert values[RANK:].norm() <= 1.0001 * layer.base_layer.weight.norm() < 1.05 * values[RANK:].norm()


def test_olora_is_orthonormal():
    data = batches(1)[0]
    base = tiny_model()
    made = prepared("olora")
    torch.testing.assert_close(made.model(**data).logits, base(**data).logits, rtol=1e-4, atol=1e-4)
    for _, layer in layers_of(made):
        b = layer.lora_B[ADAPTER].weight
        torch.testing.assert_close(b.T @ b, torch.eye(RANK), rtol=0, atol=1e-5)
        assert (layer.lora_A[ADAPTER].weight.tril(-1).abs() < 1e-5).all()  # rows of R


def inputs_of(model, names, data) -> dict[str, torch.Tensor]:
    """What each nn.Linear is given, [tokens, in_features]."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, n=name: seen[n].append(args[0].flatten(0, 1))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in data:
            model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_eva_is_the_svd_of_the_inputs():
    """With one batch again and again, incremental PCA is the PCA of that batch."""
    data = batches(1, rows=8)
    base = tiny_model()
    seen = inputs_of(base, targets(base, "all"), data)
    made = prepared("eva", seen=data, eva_rho=1.0)
    for name, layer in layers_of(made):
        a = layer.lora_A[ADAPTER].weight
        assert a.shape[0] == RANK and (layer.lora_B[ADAPTER].weight == 0).all()
        centred = seen[name] - seen[name].mean(0)
        vectors = torch.linalg.svd(centred, full_matrices=False).Vh[:RANK]
        overlap = torch.linalg.svdvals(a @ vectors.T)  # cosines between the two subspaces
        assert (overlap > 0.99).all(), (name, overlap)
        assert abs(float((a[0].detach() * vectors[0]).sum())) > 0.99, name


def test_eva_gives_ranks_to_what_is_explained_best():
    made = prepared("eva", seen=batches(3, rows=8), eva_rho=2.0)
    ranks = [int(rank) for rank in made.state_dict().values()]
    assert len(ranks) == 14 and sum(ranks) == 14 * RANK
    assert len(set(ranks)) > 1 and max(ranks) <= 2 * RANK
    assert {layer.scaling[ADAPTER] for _, layer in layers_of(made)} == {1 / RANK}


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("budget", [0.105, 0.115, 0.17])
def test_eva_stays_within_a_budget(heads, budget):
    """Ranks move to layers that are wider or narrower; of the former, those that explain least are left out."""

    def model():
        return tiny_model(num_key_value_heads=heads)

    seen = batches(3, rows=8)
    limit = budget * sum(p.numel() for p in model().parameters())
    free = prepared("eva", model(), seen, rank=prepared("eva", model(), budget=budget).rank, eva_rho=2.0, eva_tau=0.5)
    made = prepared("eva", model(), seen, budget=budget, eva_rho=2.0, eva_tau=0.5)
    assert made.trainable <= limit
    ranks, freely = made.state_dict(), free.state_dict()
    assert made.left_out == sum(int(freely[name] - rank) for name, rank in ranks.items())
    if free.trainable > limit:
        dearest = max(sum(widths) for widths in made.widths)
        assert made.left_out and made.trainable > limit - dearest  # no more than needed
        assert any("singular vectors" in note for note in made.notes)
        again = prepared("eva", model(), budget=budget, eva_rho=2.0)
        again.load_state_dict(ranks)
        assert again.trainable == made.trainable and again.left_out == made.left_out
    else:
        assert not made.left_out
    for name, layer in layers_of(made):  # the leading vectors stay
        a, b = layer.lora_A[ADAPTER].weight, dict(layers_of(free))[name].lora_A[ADAPTER].weight
        assert torch.equal(a, b[: len(a)])


def test_eva_does_not_look_for_ever(monkeypatch):
    monkeypatch.setattr(eva, "LOOKS", 5)
    with pytest.raises(UserError, match=r"^lora\.eva_tau: .* after 30 looks at the batches of lora\.samples: 6; lower"):
        prepared("eva", seen=batches(3, rows=8), eva_tau=1 - 1e-9)


def test_eva_needs_as_many_tokens_as_ranks():
    with pytest.raises(UserError, match="needs that many tokens in a batch, and there are at most 2"):
        prepared("eva", seen=batches(1, rows=1, length=2))


def test_lora_ga_steps_where_full_fine_tuning_does():
    """No update of rank 2 r is nearer to the full gradient's direction than its singular values allow; the first one
    comes near that, and nearer than LoRA's."""
    data = batches(1, rows=8)
    base = tiny_model()
    base(**data[0]).loss.backward()

    def cosines(method: str) -> dict[str, tuple[float, float]]:
        made = prepared(method, seen=data if method == "lora_ga" else None)
        torch.testing.assert_close(made.model(**data[0]).logits, base(**data[0]).logits, rtol=1e-4, atol=1e-4)
        made.model(**data[0]).loss.backward()
        found = {}
        for name, layer in layers_of(made):
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            # d(B A) of a small gradient step on A and B
            step = b.grad @ a + b @ a.grad
            gradient = base.get_submodule(name).weight.grad
            values = torch.linalg.svdvals(gradient)
            best = float(values[: 2 * RANK].norm() / values.norm())
            found[name] = float((step * gradient).sum().detach() / (step.norm() * gradient.norm()).detach()), best
        return found

    near, far = cosines("lora_ga"), cosines("lora")
    for name, (cosine, best) in near.items():
        assert 0.5 * best < cosine <= best + 1e-4, name
        assert cosine > far[name][0], name


def test_lora_ga_sees_the_mean_gradient(monkeypatch):
    data = batches(3)
    seen = {}
    inject = LoraGa.inject

    def look_first(self):
        seen.update({n: m._peft_loraga_grad for n, m in self.model.named_modules() if hasattr(m, "_peft_loraga_grad")})
        inject(self)

    monkeypatch.setattr(LoraGa, "inject", look_first)
    made = prepared("lora_ga", seen=data)
    base = tiny_model()
    for batch in data:
        (base(**batch).loss / 3).backward()
    assert seen.keys() == set(made.targets)
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, base.get_submodule(name).weight.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in made.model.parameters())


@pytest.mark.parametrize("method", ["eva", "lora_ga", "lift"])
def test_decompositions_are_not_autocast_and_passes_are(method, tmp_path, monkeypatch):
    """On a GPU, products of bfloat16 inside them have no kernel; on a CPU they are rounded."""
    seen = {"svd": set(), "pass": set()}

    def watched(owner, name, kind):
        original = getattr(owner, name)

        def watching(*args, **kwargs):
            seen[kind].add(torch.is_autocast_enabled("cpu"))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watching)

    watched(torch, "svd_lowrank", "svd")
    watched(LlamaMLP, "forward", "pass")
    train_one(config(tmp_path, method, bf16=True, max_steps=1, lift=LiftSettings(svd_iterations=2, rank=4)))
    assert seen == {"svd": {False}, "pass": {True}}


def test_miss_adds_one_matrix_to_every_shard():
    weights = {n: m.weight.clone() for n, m in tiny_model().named_modules() if isinstance(m, torch.nn.Linear)}
    made = prepared("miss", rank=5)  # which does not divide the widths: the last shard is a part of it
    train(made.model, batches(3))
    blocks = {name: layer.miss_block[ADAPTER].detach().clone() for name, layer in layers_of(made)}
    made.finish()
    for name, block in blocks.items():
        change = made.model.get_submodule(name).weight - weights[name]  # [out, in]
        for i in range(change.shape[1]):
            torch.testing.assert_close(change[:, i], block[i % 5], rtol=1e-4, atol=1e-6)
        assert block.abs().max() > 1e-3
