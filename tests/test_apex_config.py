"""Settings, presets and the ablations they switch on."""

from dataclasses import fields

import pytest
import torch
from tiny_loop import REGIMES, REPEATED, begun, copied, same, train
from tiny_models import batches, tiny_model

from graftlm.apex import Apex
from graftlm.apex_config import PRESETS, ApexConfig, apply_preset
from graftlm.errors import UserError

# -- settings -------------------------------------------------------------------------------------------------------


def differences(config: ApexConfig) -> dict:
    return {f.name: value for f in fields(config) if (value := getattr(config, f.name)) != f.default}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_differ_only_where_listed(name):
    config = apply_preset(name)
    default = ApexConfig()
    listed = {k: v for k, v in PRESETS[name].items() if v != getattr(default, k)}
    assert differences(config) == listed
    assert differences(apply_preset(name, {"k_heads": 0.4})) == {**listed, "k_heads": 0.4}
    # Wide, so that embeddings leave room in the budget, as in the models of the paper.
    model = tiny_model(num_attention_heads=8, num_key_value_heads=8, intermediate_size=512)
    apex = Apex(model, config, total_steps=9, total_epochs=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    apex.start(optimizer, assess_on=batches(1))
    train(apex, optimizer, batches(1), epoch=0.1)
    apex.finish()


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="paper-it"):
        apply_preset("paper")


@pytest.mark.parametrize(
    "options",
    [
        {"k_heads": 0.0},
        {"modules": ()},
        {"modules": ("v", "v")},
        {"operator_scale": float("inf")},
        {"activation_regularization": float("nan")},
        {"stage_by": "tokens", "stage_length": float("nan")},
        {"k_channels": 0.51},
        {"stages": 0},
        {"assess_samples": 0},
        {"stage_length": 0},
        {"stage_by": "tokens"},
        {"stages": 2, "stage_learning_rates": (1e-4,)},
        {"stages": 1, "stage_learning_rates": (0.0,)},
        {"rewarmup_ratio": 1.0},
        {"operator_learning_rate": 0.0},
        {"budget": 0.5},
        {"trains": "half", "budget": 1.5},
        {"activation_regularization": -1.0},
    ],
    ids=str,
)
def test_bad_settings_name_their_key(options):
    key = {"stage_by": "stage_length", "stages": "stage"}.get(next(iter(options)), list(options)[-1])
    with pytest.raises(UserError, match=rf"apex\.{key}"):
        ApexConfig(**options)


def test_rounding_of_k_is_said():
    apex = Apex(tiny_model(num_key_value_heads=4), ApexConfig(stages=1, k_heads=0.125))
    assert apex.effective_k == {"heads": 0.25, "channels": 0.125}
    assert "heads: K = 12.50% becomes 25.00% when rounded on key-value groups" in apex.notes


# -- ablations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", REGIMES)
def test_without_expansion_the_same_components_train(regime):
    apex, optimizer = begun(tiny_model(), expand=False, **regime)
    expanded, _ = begun(tiny_model(), **regime)
    assert apex.ties == [] and apex.operator_parameters == 0 < expanded.operator_parameters
    for name, choice in apex.choices.items():
        same(vars(choice), vars(expanded.choices[name]))
    before = copied(apex.model.state_dict())
    train(apex, optimizer, batches(2))
    moved = {name for name, value in apex.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    for expansion in apex.expansions if apex.slices is not None else ():
        for matrix in expansion.block.mixed:
            change = apex.model.get_submodule(matrix.module).weight - before[f"{matrix.module}.weight"]
            rows = change.abs().sum(1 - matrix.dim).nonzero().flatten().tolist()
            found = apex.slices.slice_of(matrix.module)
            assert rows == ([] if found is None else found.index.tolist())


def test_without_expansion_full_is_plain_training():
    apex, optimizer = begun(tiny_model(), expand=False, stages=2)
    train(apex, optimizer, batches(6))
    plain = tiny_model()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for batch in batches(6):
        plain.train()(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    same(apex.model.state_dict(), plain.state_dict())


def chosen(**options) -> list[list[int]]:
    model = tiny_model(num_attention_heads=8, num_key_value_heads=8)
    apex, _ = begun(model, assess_on=(), **options)
    found = [c.order.tolist() for c in apex.choices.values()]
    apex.next_stage()
    return found + [c.order.tolist() for c in apex.choices.values()]


def test_random_sets_need_no_data_and_follow_the_seed():
    first = chosen(assessment="random", seed=1)
    assert first == chosen(assessment="random", seed=1)
    assert first != chosen(assessment="random", seed=2)
    assert len({tuple(order) for order in first}) == len(first)  # other sets in every block and stage
    with pytest.raises(UserError, match="nothing was assessed"):
        chosen(assessment="rank")


def test_average_scores_are_mean_activations():
    apex, _ = begun(tiny_model(), assessment="average")
    apex.assess(batches(3))
    for block in apex.anatomy.blocks:
        mean = apex.recorder.mean_activations()[block.kind][block.layer]
        assert torch.equal(apex.scores()[block.name].argsort(), mean.argsort())
    rank, _ = begun(tiny_model(), assessment="rank")
    rank.assess(batches(3))
    for name, votes in rank.scores().items():
        assert votes.sum() == 0 and votes.dtype == torch.int64, name


@pytest.mark.parametrize("regime", REGIMES)
def test_the_penalty_alone_lowers_the_spread_of_activations(regime):
    apex, optimizer = begun(tiny_model(), activation_regularization=0.5, **regime)
    batch = REPEATED[0]

    def spread() -> float:
        apex.recorder.reset()
        apex.assess([batch])
        means = [a for layers in apex.recorder.mean_activations().values() for a in layers.values()]
        return float(torch.stack([a.std(correction=0) / a.mean() for a in means]).mean())

    before, penalties = spread(), []
    for _ in range(10):
        apex.model.train()(**batch)
        penalty = apex.penalty()
        penalties.append(float(penalty.detach()))
        penalty.backward()
        apex.pull_back()
        optimizer.step()
        optimizer.zero_grad()
    assert penalties[-1] < 0.97 * penalties[0]
    assert spread() < 0.99 * before


def test_no_penalty_when_off():
    apex, _ = begun(tiny_model())
    apex.model.train()(**batches(1)[0])
    assert apex.penalty() is None
