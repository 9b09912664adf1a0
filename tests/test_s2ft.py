"""S2FT: whole heads and channels train, and nothing else."""

import pytest
import torch
from sparse_loop import assert_close, begun, look_at, masked_training, plain_copy, run_config, train, weights
from tiny_models import FAMILIES, batches, tiny_model

from graftlm.anatomy import linear, read_anatomy
from graftlm.errors import UserError
from graftlm.importance import energies
from graftlm.methods import make_method
from graftlm.methods.s2ft import trained_blocks
from graftlm.methods.sparse_settings import S2ftSettings


def masks(model, method) -> dict[str, torch.Tensor]:
    """What trains, by parameter name of the plain model, from the blocks alone."""
    found: dict[str, torch.Tensor] = {}
    for block in method.blocks:
        chosen = method.choices[block.name].order[-method.counts[block.kind] :]
        for matrix in block.mixed:
            layer = model.get_submodule(matrix.module)
            index = matrix.index(chosen).flatten()
            mask = found.setdefault(f"{matrix.module}.weight", torch.zeros_like(layer.weight, dtype=torch.bool))
            mask[(index,) if matrix.dim == 0 else (slice(None), index)] = True
            if matrix.dim == 0 and layer.bias is not None:
                mask = found.setdefault(f"{matrix.module}.bias", torch.zeros_like(layer.bias, dtype=torch.bool))
                mask[index] = True
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trains", ["output", "coupled"])
def test_equals_masked_training(family, trains):
    model = tiny_model(family)
    reference = plain_copy(model)
    data = batches(8, rows=3)
    method, optimizer = begun(model, "s2ft", s2ft=S2ftSettings(budget=0.2, trains=trains))
    train(method, optimizer, data, accumulate=2)
    method.finish()
    mask = masks(reference, method)
    assert sum(int(m.sum()) for m in mask.values()) == method.trainable
    masked_training(reference, data, lambda _step, _gradients: mask, accumulate=2)
    assert_close(model, reference)
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_exist_only_for_what_trains():
    model = tiny_model(tie_word_embeddings=True)
    method, _ = begun(model, "s2ft", s2ft=S2ftSettings(budget=0.1))
    model.train()(**batches(1)[0]).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("s2ft.") for name in with_gradient)
    assert sum(model.get_parameter(name).numel() for name in with_gradient) == method.trainable


@pytest.mark.parametrize("budget", [0.03, 0.1, 0.2])
def test_budget_is_met_within_a_channel_a_layer(budget):
    model = tiny_model(intermediate_size=96)
    total = sum(p.numel() for p in model.parameters())
    method, _ = begun(model, "s2ft", s2ft=S2ftSettings(budget=budget))
    assert budget * total - 2 * 32 <= method.trainable <= budget * total


def test_numbers_of_a_whole_model_hold_for_a_shorter_one():
    method = make_method(tiny_model(num_hidden_layers=4), run_config("s2ft", s2ft=S2ftSettings(budget=0.1)))
    short = make_method(tiny_model(num_hidden_layers=2), method.resolved())
    assert short.counts == method.counts and short.trainable == method.trainable // 2


@pytest.mark.parametrize("budget, words", [(1e-4, "raise it"), (0.5, "choose s2ft.trains: coupled")])
def test_a_budget_that_cannot_be_met_says_so(budget, words):
    with pytest.raises(UserError, match=rf"s2ft\.budget: .* {words}"):
        make_method(tiny_model(), run_config("s2ft", s2ft=S2ftSettings(budget=budget)))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"heads": 5}, "4 heads"),
        ({"heads": 3, "trains": "coupled"}, "2 key-value groups"),
        ({"channels": 25}, "24 channels"),
    ],
)
def test_more_than_there_are_says_so(changes, words):
    with pytest.raises(UserError, match=rf"^s2ft\.\w+: \d+ is more than the {words} of a layer; lower it$"):
        make_method(tiny_model(), run_config("s2ft", s2ft=S2ftSettings(**changes)))


@pytest.mark.parametrize("trains", ["output", "coupled"])
@pytest.mark.parametrize("kind, number", [("heads", 0), ("heads", 1), ("channels", 0), ("channels", 3)])
def test_beside_a_number_the_other_kind_gets_the_rest(kind, number, trains):
    """As many as fit, one more would not; or all there are."""
    model = tiny_model(intermediate_size=96)
    total, other = sum(p.numel() for p in model.parameters()), "channels" if kind == "heads" else "heads"
    everything = make_method(model, run_config("s2ft", s2ft=S2ftSettings(heads=2, channels=96, trains=trains)))
    for budget in (0.06, 0.15, 0.8 * everything.trainable / total):
        made = make_method(model, run_config("s2ft", s2ft=S2ftSettings(budget, **{kind: number}, trains=trains)))
        assert made.counts[kind] == number and made.trainable <= budget * total
        more = make_method(model, made.resolved())
        more.counts = {kind: number, other: made.counts[other] + 1}
        at_most = {"channels": 96, "heads": 2 if trains == "coupled" else 4}[other]
        assert made.counts[other] == at_most or more.trainable > budget * total
        assert made.counts[other] <= at_most and sum(made.counts.values()) > 0


def test_a_number_alone_above_the_budget_says_so():
    for given in ({"heads": 4}, {"channels": 20}):
        (kind,) = given
        with pytest.raises(UserError, match=rf"^s2ft\.budget: 0.024 .* less than s2ft\.{kind}: \d+ takes \(0\.\d+\); "):
            make_method(tiny_model(), run_config("s2ft", s2ft=S2ftSettings(**given)))
    both = make_method(tiny_model(), run_config("s2ft", s2ft=S2ftSettings(heads=4, channels=20)))  # no budget is used
    assert both.counts == {"heads": 4, "channels": 20}


@pytest.mark.parametrize("choose_by", ["random", "activation"])
def test_heads_train_where_all_share_one_key_value_head(choose_by):
    model = tiny_model(num_key_value_heads=1)
    method, _ = begun(model, "s2ft", s2ft=S2ftSettings(heads=2, channels=3, choose_by=choose_by))
    assert method.counts == {"heads": 2, "channels": 3}
    assert method.trainable == 2 * (2 * 8 + 3) * 32  # two layers, heads of 8, hidden size 32
    assert not any("no P and N" in note for note in method.notes)


@pytest.mark.parametrize("choose_by", ["weight", "activation", "gradient"])
@pytest.mark.parametrize("highest", [True, False])
def test_chosen_by_a_measure(choose_by, highest):
    """Channels: against the measure worked out here, the slow way."""
    model = tiny_model()
    reference = plain_copy(model)
    settings = S2ftSettings(budget=0.15, choose_by=choose_by, highest=highest)
    method, optimizer = begun(model, "s2ft", s2ft=settings)
    down = reference.model.layers[1].mlp.down_proj
    if choose_by == "weight":
        score = down.weight.square().sum(0)
    elif choose_by == "activation":
        seen = []
        reference.model.layers[1].mlp.act_fn.register_forward_hook(lambda _m, _a, out: seen.append(out.square()))
        for batch in look_at()(0):
            reference.eval()(**batch)
        score = torch.cat([x.sum(1) for x in seen]).sum(0)
    else:
        score = torch.zeros(24)
        for batch in look_at()(0):
            reference.zero_grad()
            reference.eval()(**batch).loss.backward()
            score += down.weight.grad.square().sum(0)
    order = score.argsort(descending=highest)
    block = next(b for b in method.blocks if b.name == "layer1_channels")
    found = method.choices[block.name].order[-method.counts["channels"] :]
    assert set(found.tolist()) == set(order[: method.counts["channels"]].tolist())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith("s2ft.")
    }
    before = weights(model)
    train(method, optimizer, batches(2))  # which what was looked at must not have taken the slices from
    method.finish()
    for name, mask in masks(reference, method).items():
        assert not torch.equal(weights(model)[name], before[name])
        assert torch.equal(weights(model)[name][~mask], before[name][~mask])


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_energies(family):
    model = tiny_model(family)
    for blocks in (read_anatomy(model).blocks, trained_blocks(read_anatomy(model).blocks, "output")):
        for block in blocks:
            for matrix in block.mixed:
                weight = linear(model, matrix.module).weight.detach()
                for component in range(block.components):
                    index = matrix.index(torch.tensor([component])).flatten()
                    panel = weight.index_select(matrix.dim, index)
                    found = energies(weight, matrix, block.components)[component]
                    assert torch.allclose(found, panel.double().square().sum())


def test_bfloat16_trains_in_float32_and_goes_on_from_a_checkpoint():
    data = batches(4)
    runs = []
    for stop in (None, 2):
        model = tiny_model(dtype=torch.bfloat16)
        method, optimizer = begun(model, "s2ft", s2ft=S2ftSettings(budget=0.2))
        train(method, optimizer, data[:stop])
        if stop is not None:
            kept = [{k: v.clone() for k, v in s.items()} for s in (model.state_dict(), method.state_dict())]
            again = tiny_model(dtype=torch.bfloat16)
            method = make_method(again, run_config("s2ft", s2ft=S2ftSettings(budget=0.2), seed=7))  # another choice
            method.prepare()
            method.load_state_dict(kept[1])
            again.load_state_dict(kept[0])
            other = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad])
            method.start(other, 4)
            other.load_state_dict(optimizer.state_dict())
            train(method, other, data[2:], first=3)
            model = again
        runs.append(weights(model))
    assert any(v.dtype == torch.float32 for v in runs[0].values())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
