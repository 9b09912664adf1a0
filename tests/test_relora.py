"""ReLoRA: merges raise the rank, forget the optimizer's state, and make the schedule jagged."""

import contextlib
import dataclasses
import functools
import itertools

import pytest
import torch
from sparse_loop import ademamix
from tiny_models import batches, tiny_model
from tiny_runs import assert_same_run, interrupted, read_metrics, tiny_config

from graftlm.comparing.pilot import plan_pilot
from graftlm.errors import UserError
from graftlm.methods.adapter_settings import LoraSettings, ReloraSettings
from graftlm.methods.adapters import ADAPTER, targets
from graftlm.methods.relora import ReLora
from graftlm.models import load_model
from graftlm.training.config import DistributedConfig, RunConfig, SourceConfig
from graftlm.training.run import train_one

RANK = 2


def begun(total: int = 12, optimizer=torch.optim.AdamW, lora=None, **relora):
    """ReLoRA on a tiny model with an optimizer, before its first step."""
    settings = {"lora": LoraSettings(**{"rank": RANK, **(lora or {})}), "relora": ReloraSettings(**relora)}
    given = RunConfig(model="m", data=(SourceConfig("x"),), method="relora", **settings)
    made = ReLora(tiny_model(), given)
    made.prepare()
    made_optimizer = optimizer([p for p in made.model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    made.check_steps(total)
    made.start(made_optimizer, total)
    return made, made_optimizer


def train(made, optimizer, first: int, last: int) -> None:
    """Optimizer steps `first` to `last`, from 1."""
    data = batches(4)
    for step in range(first, last + 1):
        made.model.train()(**data[step % 4]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        made.after_step(step)


def weights(model) -> dict[str, torch.Tensor]:
    return {n.replace(".base_layer", ""): m.weight.detach().clone() for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and "lora_" not in n}  # fmt: skip


def test_merges_raise_the_rank():
    before = weights(tiny_model())
    made, optimizer = begun(interval=4)
    assert made.merges == [4, 8]
    train(made, optimizer, 1, 12)
    made.finish()
    for name, weight in weights(made.model).items():
        if name in made.targets:
            values = torch.linalg.svdvals((weight - before[name]).double())
            rank = int((values > 1e-5 * values[0]).sum())
            assert RANK < rank <= 3 * RANK, (name, rank)


def test_without_merges_it_is_lora():
    results = []
    for interval in (100, 12):  # a merge after the last step would change nothing but the adapters
        made, optimizer = begun(interval=interval)
        train(made, optimizer, 1, 12)
        made.finish()
        results.append(weights(made.model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_merge_changes_no_output_and_begins_new_adapters():
    made, optimizer = begun(interval=4)
    data = batches(1)[0]
    train(made, optimizer, 1, 3)
    old = {n: layer.lora_A[ADAPTER].weight.clone() for n, layer in made.layers().items()}
    before = made.model.eval()(**data).logits
    assert any((layer.lora_B[ADAPTER].weight != 0).any() for layer in made.layers().values())
    state = torch.random.get_rng_state()
    made.merge(4)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(made.model(**data).logits, before, rtol=1e-5, atol=1e-5)
    for name, layer in made.layers().items():
        assert (layer.lora_B[ADAPTER].weight == 0).all() and not layer.merged
        assert not torch.equal(layer.lora_A[ADAPTER].weight, old[name])


@pytest.mark.parametrize("by", ["magnitude", "random"])
def test_pruning_keeps_a_share_of_the_state(by):
    made, optimizer = begun(interval=4, prune=0.9, prune_by=by)
    train(made, optimizer, 1, 3)
    kept = {id(p): s["exp_avg"].clone() for p, s in optimizer.state.items()}
    made.merge(4)
    for parameter, state in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            share = float((state[key] == 0).float().mean())
            assert share == pytest.approx(0.9, abs=0.5 / parameter.numel() + 1e-6), key
        assert state["step"] == 3
        old, new = kept[id(parameter)].flatten(), state["exp_avg"].flatten()
        assert torch.equal(new[new != 0], old[new != 0])
        if by == "magnitude":
            assert old[new != 0].abs().min() >= old[new == 0].abs().max()


@pytest.mark.parametrize("by", ["magnitude", "random"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_step_after_a_merge_is_no_larger_than_adams(by, share):
    """A has no gradient then. 3.2 is 0.1 / sqrt(0.001), B's: a first gradient that counts as a late one."""
    made, optimizer = begun(interval=4, prune=share, prune_by=by, lora={"rank": 8})
    train(made, optimizer, 1, 4)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    train(made, optimizer, 5, 5)
    steps = [(p.detach() - old).abs().max() for p, old in zip(optimizer.param_groups[0]["params"], before, strict=True)]
    assert max(steps) <= 3.3e-2  # at a rate of 1e-2


@pytest.mark.parametrize("by", ["magnitude", "random"])
@pytest.mark.parametrize("paged", [False, True])
def test_moments_that_lie_in_one_tensor_are_pruned_too(by, paged):
    """AdEMAMix's two first ones: the same entries of both and of the second moment, so that no step is large."""
    made, optimizer = begun(
        interval=4, prune=0.9, prune_by=by, lora={"rank": 8}, optimizer=functools.partial(ademamix, paged=paged)
    )
    train(made, optimizer, 1, 4)
    for state in optimizer.state.values():
        gone = state["state2"] == 0
        assert float(gone.float().mean()) == pytest.approx(0.9, abs=0.01)
        assert all(torch.equal(moment == 0, gone) for moment in state["state1"])
    for step in (5, 6):  # A has no gradient in the first of them
        before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        train(made, optimizer, step, step)
        pairs = zip(optimizer.param_groups[0]["params"], before, strict=True)
        assert max((p.detach() - old).abs().max() for p, old in pairs) <= 8e-2  # at a rate of 1e-2, and alpha is 5


def test_resetting_forgets_everything():
    made, optimizer = begun(interval=4, prune=1.0)
    train(made, optimizer, 1, 3)
    assert len(optimizer.state) == 2 * len(made.targets)
    made.merge(4)
    assert not optimizer.state


def test_keeping_the_state():
    made, optimizer = begun(interval=4, prune=0.0)
    train(made, optimizer, 1, 3)
    before = {id(p): s["exp_avg"].clone() for p, s in optimizer.state.items()}
    made.merge(4)
    assert all(torch.equal(s["exp_avg"], before[id(p)]) for p, s in optimizer.state.items())


def test_the_schedule_is_jagged():
    made, _ = begun(total=20, interval=5, warmup=2)
    factors = [made.rate_factor(step) for step in range(20)]
    climbing = {5: 0.5, 10: 0.5, 15: 0.5}
    assert factors == [climbing.get(step, 1.0) for step in range(20)]
    made, _ = begun(total=20, interval=0.25, warmup=0.2, warm_start=0.25)
    assert made.merges == [10, 15] and (made.warm, made.warmup) == (5, 4)
    assert [made.rate_factor(step) for step in range(5, 11)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.25]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"interval": 4}, "merged 2 times, after every 4 steps from 4 on, and at the end"),
        ({"interval": 0.5}, "merged after step 6, and at the end"),
        ({"interval": 5, "warm_start": 3}, "merged after step 8, and at the end"),
        ({"interval": 5_000}, "no merge before the end of the run's 12 steps: adapters train as lora's do"),
    ],
)
def test_the_notes_say_when_merges_happen(changes, told):
    made, _ = begun(total=12, **changes)
    assert told in made.notes[-1]


@pytest.mark.parametrize("start", [12, 5_000])
def test_a_warm_start_that_is_the_whole_run_says_so(start):
    with pytest.raises(
        UserError, match=rf"^relora\.warm_start: {start} of the run's 12 steps leave none to adapters; "
    ):
        begun(total=12, warm_start=start)
    for less in (11, 0.99):  # a share of the run is not all of it
        made, _ = begun(total=12, warm_start=less)
        assert made.warm == 11 and made.merges == []


def test_what_a_run_takes_a_pilot_takes(tmp_path):
    """Its spans are rounded, each by itself."""
    made, optimizer = begun()
    spans = {"interval": (1, 30, 299.5, 8_999, 0.0033, 0.25), "warmup": (0, 1, 29.6, 300, 0.0033, 0.25),
             "warm_start": (0, 1, 8_999, 0.9999)}  # fmt: skip
    tried = 0
    for values in itertools.product(*spans.values()):
        settings = ReloraSettings(**dict(zip(spans, values, strict=True)))
        with contextlib.suppress(UserError):
            made.relora = settings
            made.check_steps(9_000)
            plan = plan_pilot(tiny_config(tmp_path, max_steps=9_000, method="relora", relora=settings), 9_000)
            made.relora, tried = plan.config.relora, tried + 1
            try:
                made.check_steps(plan.steps)
                made.start(optimizer, plan.steps)
            except UserError as error:
                raise AssertionError(settings) from error
    assert tried > 60


def test_a_warmup_longer_than_the_interval_says_so():
    for warmup, interval in ((100, 2), (3, 2), (0.5, 0.25), (0.5, 3)):
        with pytest.raises(UserError, match=r"^relora\.warmup: \d+ of the run's 12 steps are more than the \d between"):
            begun(total=12, interval=interval, warmup=warmup)
    # As long as it is; a pilot rounds numbers and shares apart; a share of no step.
    for warmup, interval in ((4, 4), (0.25, 0.25), (3, 0.2), (1, 0.01), (0.01, 0.01)):
        made, _ = begun(total=12, interval=interval, warmup=warmup)
        assert 0 <= made.warmup <= made.merges[0]
        assert not made.warmup or max(made.rate_factor(step) for step in range(made.merges[0], 12)) == 1.0


def test_a_warm_start_trains_all_weights_first():
    made, optimizer = begun(interval=4, warm_start=3)
    given = tiny_model().state_dict()
    train(made, optimizer, 1, 2)
    now = {n.replace(".base_layer", ""): p.detach().clone() for n, p in made.model.named_parameters()}
    assert all(not torch.equal(value, now[name]) for name, value in given.items())  # embeddings and norms too
    assert all((layer.lora_B[ADAPTER].weight == 0).all() for layer in made.layers().values())
    train(made, optimizer, 3, 3)
    assert not optimizer.state and made.trainable == sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    after = weights(made.model)
    train(made, optimizer, 4, 5)
    assert all(torch.equal(value, after[name]) for name, value in weights(made.model).items())
    assert all((layer.lora_B[ADAPTER].weight != 0).any() for layer in made.layers().values())


def test_a_warm_start_of_no_step_trains_adapters_only():
    made, _ = begun(total=100, warm_start=0.004)
    assert made.warm == 0
    assert made.trainable == sum(p.numel() for p in made.model.parameters() if p.requires_grad)


def config(folder, **changes):
    settings = {"lora": LoraSettings(rank=RANK), "relora": ReloraSettings(interval=3, warmup=2), "max_steps": 9}
    return tiny_config(folder, **{"method": "relora", "learning_rate": 1e-2, **settings, **changes})


def test_a_run(tmp_path):
    summary = train_one(config(tmp_path, lr_scheduler_type="constant", warmup_ratio=0.0))
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run") if line["event"] == "train"]
    assert rates == pytest.approx([1e-2] * 3 + [5e-3, 1e-2, 1e-2] * 2)
    assert summary["trainable_fraction"] < 0.05 and summary["fused_max_abs_logit_difference"] < 1e-5
    model, given = load_model(str(tmp_path / "run" / "model")), load_model("tiny-llama")
    name = targets(given, "ffn")[-1]
    change = model.get_submodule(name).weight - given.get_submodule(name).weight
    values = torch.linalg.svdvals(change.double())
    assert int((values > 1e-4 * values[0]).sum()) > RANK


KINDS = {
    "prune": {"interval": 3, "warmup": 2},
    "random": {"interval": 3, "prune_by": "random"},
    "reset": {"interval": 3, "prune": 1.0},
    "warm": {"interval": 3, "warm_start": 4},
}


@pytest.mark.parametrize("stopped", [5, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", ["prune", "warm", *(pytest.param(k, marks=pytest.mark.slow) for k in ("random", "reset"))]
)
def test_a_resumed_run_ends_with_the_same_bits(kind, stopped, dropping, tmp_path):
    """Across a merge, or the end of the warm start."""
    changes = {
        "model": dropping, "save_steps": 2, "lora": LoraSettings(rank=RANK, dropout=0.1),
        "relora": ReloraSettings(**KINDS[kind]),
    }  # fmt: skip
    whole, broken = config(tmp_path / "a", **changes), config(tmp_path / "b", **changes)
    train_one(whole)
    interrupted(broken, stopped)
    train_one(broken, resume=True)
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")


def test_what_is_refused():
    given = RunConfig(model="m", data=(SourceConfig("x"),), method="relora", lora=LoraSettings(rank=RANK))
    warm = dataclasses.replace(
        given, relora=ReloraSettings(warm_start=0.1), distributed=DistributedConfig(strategy="ddp")
    )
    with pytest.raises(UserError, match=r"^relora.warm_start: ddp cannot change what trains"):
        ReLora(tiny_model(), warm).prepare()
    with pytest.raises(UserError, match=r"^relora.prune: 0.99 of a state in 8 bits"):
        ReLora(tiny_model(), dataclasses.replace(given, optim="adamw_8bit")).prepare()
    with pytest.raises(UserError, match=r"^relora.prune: 0.99 of a factored state"):
        ReLora(tiny_model(), dataclasses.replace(given, optim="adafactor")).prepare()
    for bad in ({"interval": 0}, {"warmup": -1}, {"warm_start": -1}, {"prune": 1.5}):
        with pytest.raises(UserError, match=f"^relora.{next(iter(bad))}: "):
            ReloraSettings(**bad)
