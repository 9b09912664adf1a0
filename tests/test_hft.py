"""HFT: half of every category trains, another half in every round."""

import pytest
import torch
from sparse_loop import assert_close, begun, masked_training, plain_copy, train, weights
from tiny_models import FAMILIES, batches, tiny_model

from graftlm.methods.hft import NORMS, categories, halves
from graftlm.methods.sparse_settings import HftSettings
from graftlm.pruning.prune import prune
from graftlm.pruning.settings import PruneSettings


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [2, 3])
def test_categories_halve(family, layers):
    model = tiny_model(family, num_hidden_layers=layers)
    found = categories(model)
    assert set(found) == {"self_attn", "mlp", NORMS}
    in_layers = {n.rpartition(".")[0] for n, _ in model.named_parameters() if ".layers." in n}
    assert {m for by_layer in found.values() for modules in by_layer for m in modules} == in_layers
    for seed in range(5):
        chosen = halves(found, torch.Generator().manual_seed(seed))
        for by_layer in found.values():
            counts = [len(chosen & set(modules)) for modules in by_layer]
            sizes = [len(modules) for modules in by_layer]
            assert all(abs(count - size / 2) <= 0.5 for count, size in zip(counts, sizes, strict=True))
            assert abs(sum(counts) - sum(sizes) / 2) <= 0.5


def test_layers_that_hold_matrices_themselves_halve_too():
    """As those that SliceGPT leaves."""
    settings = PruneSettings(method="slicegpt", sparsity=0.4)
    model = prune(tiny_model(num_hidden_layers=4), settings, lambda _: batches(1, rows=8)).model
    found = categories(model)
    assert found[""] == [[f"model.layers.{i}"] for i in range(4)]
    method, _ = begun(model, "hft", total=6)
    trained = [i for i in range(4) if model.model.layers[i].attention_shortcut.requires_grad]
    assert len(trained) == 2
    assert method.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def frozen(model) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_rounds_draw_another_half_and_what_is_frozen_has_no_gradient():
    model = tiny_model()
    method, optimizer = begun(model, "hft", hft=HftSettings(round_steps=2), total=6)
    sets = []

    def each(_step):
        assert {name for name, p in model.named_parameters() if p.grad is None} == frozen(model)
        if not sets or frozen(model) != sets[-1]:
            sets.append(frozen(model))
        with_state = {name for name, p in model.named_parameters() if p in optimizer.state}
        assert not with_state & frozen(model)

    before = weights(model)
    train(method, optimizer, batches(2), each=each)
    stayed = {name for name, value in weights(model).items() if torch.equal(value, before[name])}
    assert stayed == sets[0]
    train(method, optimizer, batches(4), first=3, each=each)
    assert len(sets) == 3 and method.begins == [2, 4]
    assert not any("embed" in name or "lm_head" in name or name == "model.norm.weight" for s in sets for name in s)
    assert sum(model.get_parameter(n).numel() for n in model.state_dict() if n not in frozen(model)) == method.trainable
    method.finish()
    assert not frozen(model)


@pytest.mark.parametrize("family, changes", [("llama", {}), ("qwen3", {"tie_word_embeddings": True}), ("phi3", {})])
def test_equals_masked_training(family, changes):
    """Within a round; at its end state is forgotten where a matrix freezes, and the oracle knows none of that."""
    model = tiny_model(family, **changes)
    reference = plain_copy(model)
    data = batches(8, rows=3)
    method, optimizer = begun(model, "hft")
    left = frozen(model)
    train(method, optimizer, data, accumulate=2)

    def masks_of(_step, gradients):
        return {name: torch.ones_like(g, dtype=torch.bool) for name, g in gradients.items() if name not in left}

    masked_training(reference, data, masks_of, accumulate=2)
    assert left and weights(model).keys() == weights(reference).keys()
    assert_close(model, reference)


@pytest.mark.parametrize("epochs, expected", [(1, []), (2, [6]), (2.5, [5, 10]), (3, [4, 8])])
def test_a_round_is_an_epoch(epochs, expected):
    method, _ = begun(tiny_model(), "hft", total=12, num_train_epochs=epochs)
    assert method.begins == expected
    method, _ = begun(tiny_model(), "hft", total=12, num_train_epochs=epochs, max_steps=12)
    assert method.begins == []
