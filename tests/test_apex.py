"""The public object: stages, the optimizer, saving and going on, and what is left behind."""

import copy

import pytest
import torch
from tiny_loop import QUARTER, REGIMES, REPEATED, begun, copied, same, train
from tiny_models import batches, tiny_model
from transformers import AutoModelForCausalLM

from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.checkpointing import load_optimizer, load_tensors, save_optimizer, save_tensors
from graftlm.errors import UserError

# -- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loop_lowers_the_loss_and_leaves_a_plain_model(regime, dtype, tmp_path):
    model = tiny_model(dtype=dtype)
    names = set(model.state_dict())
    apex, optimizer = begun(model, stages=3, **regime)
    losses = train(apex, optimizer, REPEATED)
    assert apex.clock.starts == [0, 4, 8]
    assert losses[-1] < 0.8 * losses[0]
    ids = REPEATED[0]["input_ids"]
    live = model.eval()(ids).logits.detach()
    apex.finish()
    assert torch.equal(model(ids).logits, live)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=dtype)
    assert torch.equal(reopened.eval()(ids).logits, live)


def test_operators_do_learn():
    apex, optimizer = begun(tiny_model())
    train(apex, optimizer, batches(3))
    for tie in apex.ties:
        assert tie.operator.matrix().abs().max() > 0


# -- stages ---------------------------------------------------------------------------------------------------------


def boundaries(apex, optimizer, data, epoch=None) -> list[int]:
    found = []
    for i, batch in enumerate(data):
        train(apex, optimizer, [batch], **({} if epoch is None else {"epoch": (i + 1) * epoch}))
        if len(apex.clock.starts) > len(found) + 1:
            found.append(i + 1)
    return found


@pytest.mark.parametrize(
    "options, totals, expected",
    [
        ({"stages": 3}, {"total_steps": 10}, [3, 7]),
        ({"stages": 3, "stage_length": 2}, {}, [2, 4]),
        ({"stages": 1}, {}, []),
        ({"stages": 2, "stage_by": "tokens", "stage_length": 100}, {}, [5]),  # 24 tokens a batch
        ({"stages": 3, "stage_by": "tokens", "stage_length": 48}, {}, [2, 4]),
    ],
)
def test_stages_by_steps_and_tokens(options, totals, expected):
    model = tiny_model()
    apex = Apex(model, ApexConfig(**options), **totals)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    apex.start(optimizer, assess_on=batches(1))
    assert boundaries(apex, optimizer, batches(10)) == expected
    assert apex.clock.starts == [0, *expected]
    assert apex.clock.stage == len(expected)


def test_padding_does_not_bring_a_stage_by_tokens_nearer():
    model = tiny_model()
    apex, optimizer = begun(model, stages=2, stage_by="tokens", stage_length=40)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[:, 6:] = 0  # 12 tokens a batch
    assert boundaries(apex, optimizer, [b | {"attention_mask": mask} for b in batches(6)]) == [4]


@pytest.mark.parametrize("length, expected", [(None, [4]), (0.5, [2])])
def test_stages_by_epochs(length, expected):
    model = tiny_model()
    config = ApexConfig(stages=2, stage_by="epochs", stage_length=length)
    apex = Apex(model, config, total_epochs=None if length else 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    apex.start(optimizer, assess_on=batches(1))
    assert boundaries(apex, optimizer, batches(8), epoch=0.25) == expected
    with pytest.raises(UserError, match="epoch"):
        apex.clock.stage = 0
        apex.advance()


@pytest.mark.parametrize(
    "options, totals, message",
    [
        ({"stages": 3}, {}, "total_steps"),
        ({"stages": 3, "stage_by": "epochs"}, {"total_steps": 10}, "num_train_epochs"),
        ({"stages": 3}, {"total_steps": 2}, "3 stages do not fit in 2 steps"),
    ],
)
def test_stages_that_cannot_be_laid_out(options, totals, message):
    with pytest.raises(UserError, match=message):
        Apex(tiny_model(), ApexConfig(**options), **totals)


# -- saving and going on --------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"share_operators": False},
    {"operator": "dense"},
    {"operator": "diagonal"},
    {"operator_learning_rate": "auto"},
    {"operator_learning_rate": "auto", "share_operators": False},
    {"authors_diagonals": True},
    {"expand": False},
    {"assessment": "random"},
    {"assessment": "average", "assess_per": "microbatch"},
    {"activation_regularization": 0.1},
    {"stage_by": "tokens", "stage_length": 96},
]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "defaults")
@pytest.mark.parametrize("stop", [2, 4, 6])  # mid-stage, at a boundary, in the second stage
def test_going_on_is_bitwise_the_same(regime, options, stop, tmp_path):
    if options.get("authors_diagonals") and regime:
        regime = {**regime, "budget": 0.9}  # which need all of N
    going_on_is_bitwise_the_same({**options, **regime}, stop, torch.float32, tmp_path)


@pytest.mark.parametrize("regime", REGIMES)
def test_going_on_is_bitwise_the_same_in_bfloat16(regime, tmp_path):
    going_on_is_bitwise_the_same(regime, 6, torch.bfloat16, tmp_path)


def going_on_is_bitwise_the_same(settings, stop, dtype, tmp_path):
    settings = {"stages": 2, **settings}
    data = batches(8)
    whole, optimizer = begun(tiny_model("qwen2", dtype), total_steps=8, **settings)
    train(whole, optimizer, data)

    first, optimizer_1 = begun(tiny_model("qwen2", dtype), total_steps=8, **settings)
    train(first, optimizer_1, data[:stop])
    save_tensors(tmp_path / "model", first.model.state_dict())
    save_tensors(tmp_path / "apex", first.state_dict())
    save_optimizer(tmp_path / "optimizer", optimizer_1)

    model = tiny_model("qwen2", dtype, seed=3)
    model.load_state_dict(load_tensors(tmp_path / "model"))
    second = Apex(model, first.config, total_steps=8)
    optimizer_2 = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    second.load_state_dict(load_tensors(tmp_path / "apex"))
    second.start(optimizer_2)
    load_optimizer(tmp_path / "optimizer", optimizer_2)
    same(second.state_dict(), first.state_dict())
    train(second, optimizer_2, data[stop:])

    same(second.state_dict(), whole.state_dict())
    ours, theirs = (o.state_dict()["state"] for o in (optimizer_2, optimizer))
    assert ours.keys() == theirs.keys()
    for index, values in theirs.items():
        same(ours[index], values)
    for apex in (second, whole):
        apex.finish()
    same(second.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("regime", REGIMES)
def test_the_models_state_has_nothing_of_ours(regime, tmp_path):
    model = tiny_model()
    names = set(model.state_dict())
    apex, optimizer = begun(model, **regime)
    train(apex, optimizer, batches(2))
    state = copied(model.state_dict())
    assert set(state) == names
    same(state, {k: v for k, v in model.named_parameters() if not k.startswith("apex.")})
    assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
    with pytest.raises(RuntimeError, match="lm_head"):  # a key that is missing is still missed
        model.load_state_dict({k: v for k, v in state.items() if k != "lm_head.weight"})
    model.save_pretrained(tmp_path)  # in the middle of a stage: effective weights
    ids = batches(1)[0]["input_ids"]
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(reopened(ids).logits, model.eval()(ids).logits)


# -- the optimizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", REGIMES)
def test_operators_do_not_decay_and_have_their_own_rate(regime):
    """Plain SGD, so that a step is rate * gradient. At R = 0, D has no gradient: only decay could move it."""
    rate, multiplier = 0.01, 7.0
    apex, optimizer = begun(
        tiny_model(), optimizer=torch.optim.SGD, lr=rate, operator_learning_rate=multiplier, **regime
    )
    before = [copied(tie.operator.state_dict()) for tie in apex.ties]
    apex.model.train()(**batches(1)[0]).loss.backward()
    apex.pull_back()
    gradients = [tie.operator.R.grad.clone() for tie in apex.ties]
    optimizer.step()
    for tie, old, gradient in zip(apex.ties, before, gradients, strict=True):
        assert gradient.abs().max() > 0
        assert torch.equal(tie.operator.D, old["D"])
        torch.testing.assert_close(tie.operator.R.detach(), -rate * multiplier * gradient)


@pytest.mark.parametrize("setting", [49.0, "auto"])  # 49 * x / 49 is not x
@pytest.mark.parametrize("rate", [2e-5, 1e-3, 0.3])
def test_rates_are_multiplied_only_inside_the_step(setting, rate):
    apex, optimizer = begun(tiny_model(), lr=rate, operator_learning_rate=setting)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([g["lr"] for g in optimizer.param_groups]))
    for batch in batches(5):
        train(apex, optimizer, [batch])
        assert {group["lr"] for group in optimizer.param_groups} == {rate}  # to the last bit, however many steps
    operators = {id(p) for tie in apex.ties for p in tie.parameters()}
    for group, inside in zip(optimizer.param_groups, seen[-1], strict=True):
        if any(id(p) in operators for p in group["params"]):
            assert inside == pytest.approx(49 * rate) if setting == 49 else inside != rate
            assert group["weight_decay"] == 0
        else:
            assert inside == rate
            assert group["weight_decay"] == 0.1
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(apex.model.parameters()))


@pytest.mark.parametrize("kind", ["monarch", "dense", "diagonal"])
def test_auto_moves_rows_through_m_as_far_as_directly(kind):
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 16}
    model = tiny_model(**shape)
    apex = Apex(
        model, ApexConfig(stages=1, operator=kind, share_operators=False, operator_learning_rate="auto", **QUARTER)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    apex.start(optimizer, assess_on=batches(2))
    raw = [copied(e.raw) for e in apex.expansions]
    train(apex, optimizer, batches(1, rows=8))
    for expansion, before in zip(apex.expansions, raw, strict=True):
        for tie in expansion.ties:
            panel = expansion.advantageous_panels(tie)[0]
            key = f"{tie.pieces[0].key}:n"
            through_m = float((tie.operator.matrix().detach() @ panel).norm())
            directly = float((expansion.raw[key] - before[key]).norm())
            assert 0.5 < through_m / directly < 2, (tie.name, through_m / directly)


@pytest.mark.parametrize("options", [*REGIMES, {"expand": False, "trains": "small", "budget": 0.2}])
def test_an_optimizer_made_too_early_is_refused(options):
    model = tiny_model()
    early = torch.optim.AdamW(model.parameters())
    apex = Apex(model, ApexConfig(stages=1, **options))
    with pytest.raises(UserError, match="after Apex"):
        apex.start(early, assess_on=batches(1))
    optimizer = torch.optim.AdamW(model.parameters())
    apex.start(optimizer)  # and nothing is spoilt: what was assessed is there
    train(apex, optimizer, batches(1))


@pytest.mark.parametrize("regime", REGIMES)
def test_a_skipped_step_leaves_no_trace(regime):
    """As a gradient scaler skips: pull_back, then zero_grad without a step."""
    plain, skipping = (begun(tiny_model(), **regime) for _ in range(2))
    skipping[0].model.eval()(**batches(1, seed=4)[0]).loss.backward()  # eval: not counted either
    skipping[0].pull_back()
    skipping[1].zero_grad()
    for apex, optimizer in (plain, skipping):
        train(apex, optimizer, batches(3))
    same(skipping[0].state_dict(), plain[0].state_dict())
    same(skipping[0].model.state_dict(), plain[0].model.state_dict())


# -- what is left behind --------------------------------------------------------------------------------------------


def traces(model) -> dict[str, object]:
    """All that could be left on a model: hooks of every kind, replaced methods, modules, what trains."""
    found: dict[str, object] = {"trains": [(n, p.requires_grad) for n, p in model.named_parameters()]}
    for name, module in model.named_modules():
        hooks = {k: len(v) for k, v in vars(module).items() if "hooks" in k and v}
        found[name] = (type(module), hooks, "forward" in vars(module))
    return found


@pytest.mark.parametrize("frozen", [(), ("embed_tokens", "lm_head"), ("layers.1",)])
@pytest.mark.parametrize("regime", REGIMES)
def test_finish_leaves_an_ordinary_model(regime, frozen):
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    before = traces(model)
    apex, optimizer = begun(model, **regime)
    assert traces(model) != before
    train(apex, optimizer, batches(2))
    apex.finish()
    assert traces(model) == before
    copy.deepcopy(model)(**batches(1)[0])
    again, optimizer = begun(model, **regime)
    train(again, optimizer, batches(1))


@pytest.mark.parametrize("regime", REGIMES)
def test_two_at_once_are_refused_and_the_first_goes_on(regime):
    model = tiny_model()
    apex, optimizer = begun(model)
    before = traces(model)
    with pytest.raises(UserError, match="already has an Apex"):
        Apex(model, ApexConfig(stages=1, **regime))
    assert traces(model) == before
    train(apex, optimizer, batches(1))


@pytest.mark.parametrize("seed", [20261122, 2**32 - 1])
def test_a_large_seed(seed):
    apex, optimizer = begun(tiny_model(), stages=2, total_steps=4, seed=seed)
    train(apex, optimizer, REPEATED[:4])
    assert apex.clock.stage == 1


def test_effective_k_is_of_all_layers():
    """Layers of a pruned model have each their own number of groups."""
    model = tiny_model(**{"num_attention_heads": 8, "num_key_value_heads": 8})
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = getattr(attention, name)
        layer.weight = torch.nn.Parameter(layer.weight[:16].detach())
        layer.out_features = 16
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :16].detach())
    attention.o_proj.in_features = 16
    apex = Apex(model, ApexConfig(stages=1, k_heads=0.125), total_steps=1)
    assert apex.effective_k["heads"] == (1 + 1) / (2 + 8)
    assert "heads: K = 12.50% becomes 12.50% to 50.00% (by layer) when rounded on key-value groups" in apex.notes


def test_every_stage_and_block_draws_numbers_of_its_own():
    apex, _ = begun(tiny_model(), assessment="random", stages=2)
    first = {name: choice.order for name, choice in apex.choices.items()}
    drawn = [tie.operator.D.detach().clone() for tie in apex.ties]
    assert not torch.equal(first["layer0_channels"], first["layer1_channels"])
    apex.next_stage()
    assert not torch.equal(first["layer0_channels"], apex.choices["layer0_channels"].order)
    assert not any(torch.equal(old, tie.operator.D) for old, tie in zip(drawn, apex.ties, strict=True))


def test_an_epoch_that_reads_a_little_less_ends_a_stage():
    apex, _ = begun(tiny_model(), stages=2, stage_by="epochs", stage_length=1.0)
    assert apex.clock.due(epoch=0.9999999, tokens=0) and not apex.clock.due(epoch=0.99, tokens=0)


def test_the_multiplier_of_a_shared_operator_is_that_of_all_its_matrices():
    apex, _ = begun(tiny_model(), operator_learning_rate="auto", stages=2)
    with torch.no_grad():
        for name, parameter in apex.model.named_parameters():
            if "gate_proj" in name:
                parameter.mul_(10)
    apex.assess(batches(2))
    apex.next_stage()
    for tie, multiplier in zip(apex.ties, apex.rates.multipliers, strict=True):
        panels = apex._expansion_of[tie.name].advantageous_panels(tie)
        rms = torch.cat([panel.flatten() for panel in panels]).square().mean().sqrt()
        assert multiplier == pytest.approx(1 / (tie.operator.spread() * float(rms)), rel=1e-5)
