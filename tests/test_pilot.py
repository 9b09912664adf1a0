"""The pilot: budget, scaled schedule, when it stops, what a replay says."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console
from tiny_comparisons import finish, opened, write_comparison
from tiny_runs import tiny_config

from graftlm import cli
from graftlm.comparing import pilot as piloting
from graftlm.comparing import process
from graftlm.comparing.pilot import pilot, plan_pilot, planned_steps
from graftlm.comparing.process import RunFailed
from graftlm.comparing.statistics import repeated_interval
from graftlm.comparing.summary import summarise
from graftlm.comparing.verdict import FASTER, check, judge, replay, replay_comparison
from graftlm.errors import UserError
from graftlm.methods.adapter_settings import ReloraSettings
from graftlm.methods.sparse_settings import HftSettings, IstSettings, LiftSettings
from graftlm.training.config import DistributedConfig
from graftlm.training.run import train_one


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


# --- when it stops


def test_judge():
    assert judge([0.1, 0.1]).answer == "undecided"  # two pairs have no interval
    assert judge([0.1, 0.101, 0.099]).answer == "pays"
    assert judge([-0.1, -0.101, -0.099]).answer == "does not"
    assert judge([0.0010, 0.0011, 0.0009]).answer == "does not"  # surely better, by less than the minimum effect
    assert judge([0.0010, 0.0011, 0.0009], minimum_effect=0.0).answer == "pays"
    unsure = judge([0.1, -0.1, 0.05])
    assert unsure.answer == "undecided"
    assert unsure.interval == repeated_interval([0.1, -0.1, 0.05], 3)


def test_replay_stops_at_the_first_clear_look():
    gains = [0.1, 0.16, 0.1, 0.11, -5.0]
    assert judge(gains[:3]).answer == "undecided"
    found = replay(gains, gains)
    assert (found.answer, found.pairs) == ("pays", 4)  # and never sees the fifth
    assert found.gain == pytest.approx(np.mean(gains[:4]))
    assert replay([0.1, -0.1] * 10, []).pairs == 5  # no more than are allowed
    assert (replay([], []).answer, replay([], []).gain) == ("undecided", None)


def test_a_gain_is_checked_against_plain_training_at_a_higher_rate():
    gains = [0.1, 0.101, 0.099]
    for ahead, answer in [(0.02, "pays"), (0.11, "does not"), (0.5, "does not"), (0.0975, "undecided")]:
        found = replay(gains, [gain - ahead for gain in gains])
        assert (found.answer, found.gain) == (answer, pytest.approx(0.1))
        assert found.over_faster == pytest.approx(0.1 - ahead)
        assert found == check(judge(gains), [gain - ahead for gain in gains])
    unclear = [0.1, -0.1, 0.06, 0.1, -0.02]
    for over, answer in [([-0.3, -0.31, -0.3], "does not"), ([0.3, 0.31, 0.3], "undecided"), (unclear, "undecided")]:
        assert replay(unclear, over).answer == answer  # not ahead of the faster control is not ahead
    none = replay([-gain for gain in gains], [1.0, 1.0, 1.0])  # no gain, nothing to check
    assert (none.answer, none.over_faster, none.over_faster_interval) == ("does not", None, None)


def _replayed(gains, minimum_effect: float) -> str:
    """Where a higher rate gains nothing."""
    return replay(list(gains), list(gains), minimum_effect=minimum_effect).answer


@pytest.mark.parametrize(("true", "wrong"), [(0.0, "pays"), (0.05, "does not")])
def test_a_replayed_pilot_is_rarely_wrong(true, wrong):
    """Stopping when it looks good does not make false answers: at most 5% (2.5% a side, here with a minimum effect in
    between)."""
    rng, trials = np.random.default_rng(7), 1_000
    answers = [_replayed(rng.normal(true, 0.05, 5), 0.025) for _ in range(trials)]
    assert answers.count(wrong) / trials <= 0.05
    at_the_border = [_replayed(rng.normal(0.025, 0.05, 5), 0.025) for _ in range(trials)]
    assert 1 - at_the_border.count("undecided") / trials <= 0.06


def test_a_clear_gain_is_found():
    rng = np.random.default_rng(8)
    answers = [_replayed(rng.normal(0.05, 0.005, 5), 0.002) for _ in range(200)]
    assert answers.count("pays") > 190


def test_replay_of_comparisons(tmp_path):
    faster = {"apex": {"method": "apex"}, "faster": {"method": "full", "learning_rate": 0.5}}

    def summary(folder, gain, ahead=0.0):
        given = write_comparison(tmp_path / folder, plain_multiples=[1], variants=faster)
        comparison, cells = opened(given)
        better = {"control": 0.0, "apex": gain, "faster": ahead}
        finish(cells, lambda cell: 3 + 0.001 * cell.seed**2 * (cell.arm == "apex") - better[cell.arm])
        return summarise(comparison, cells, {})

    def replayed(short, long):
        (found,) = replay_comparison(summary(*short), summary(*long), faster="faster")
        return found.name, found.verdict.answer, found.truth, found.right

    assert replayed(("a", 0.1), ("b", 0.05)) == ("apex", "pays", "pays", True)
    assert replayed(("c", 0.1), ("d", -0.05)) == ("apex", "pays", "does not", False)
    assert replayed(("e", 0.1), ("f", 0.003)) == ("apex", "pays", "undecided", None)
    assert replayed(("g", 0.1, 0.2), ("h", -0.05)) == ("apex", "does not", "does not", True)
    assert replayed(("i", 0.1, 0.2), ("j", 0.05)) == ("apex", "does not", "pays", False)
    assert replayed(("k", 0.1), ("l", 0.05, 0.08)) == ("apex", "pays", "does not", False)  # plain gains more


def test_replayed_pairs_are_of_one_seed():
    def comparison(**gains):
        arms = [{"name": name, "matched": "control", "difference": {"by_seed": by}} for name, by in gains.items()]
        return {"arms": [*arms, {"name": "control"}]}

    gains = {"0": -0.1, "1": -0.2, "2": -0.3, "3": -0.4}
    some = {seed: gap for seed, gap in gains.items() if seed != "1"}  # a run failed
    short = comparison(apex=gains, faster=some)
    (found,) = replay_comparison(short, short, faster="faster", pairs=4, minimum_effect=-1)
    assert found.verdict.over_faster == pytest.approx(0)
    short["arms"][0]["matched"] = "another"
    with pytest.raises(UserError, match="several controls"):
        replay_comparison(short, short, faster="faster")


# --- the runs it makes


@pytest.mark.parametrize("share", [0.05, 0.02])
@pytest.mark.parametrize("pairs", [3, 5])
def test_all_pairs_and_the_check_stay_in_the_budget(tmp_path, share, pairs):
    config = tiny_config(tmp_path)
    plan = plan_pilot(config, 20_000, share=share, pairs=pairs)
    assert 0.9 * share * plan.planned_tokens < plan.most_tokens <= share * plan.planned_tokens
    assert plan.config.max_steps == plan.steps and plan.pairs == pairs
    trained = plan.steps * 4 * config.max_length
    assert plan.run_tokens == trained
    assessed = plan.config.apex.assess_samples * config.max_length
    assert plan.most_tokens == pairs * (2 * trained + assessed) + 3 * trained


def test_a_shorter_run_gets_fewer_pairs(tmp_path):
    config = tiny_config(tmp_path)
    planned = {steps: plan_pilot(config, steps) for steps in (1_900, 2_400, 2_800)}
    assert {steps: plan.pairs for steps, plan in planned.items()} == {1_900: 3, 2_400: 4, 2_800: 5}
    assert all(plan.steps == 10 and plan.most_tokens <= 0.05 * plan.planned_tokens for plan in planned.values())


def test_the_schedule_is_scaled(tmp_path):
    config = tiny_config(tmp_path, apex={"stage_by": "tokens", "stage_length": 1e6})
    plan = plan_pilot(config, 10_000)
    scale = plan.steps / 10_000
    assert plan.config.apex.stage_length == pytest.approx(1e6 * scale)
    assert plan.config.apex.stage_by == "tokens"
    assert plan.config.warmup_ratio == config.warmup_ratio  # a share of the run, as it is
    epochs = tiny_config(tmp_path, apex={"stage_by": "epochs", "stages": 2}, max_steps=-1, num_train_epochs=2)
    plan = plan_pilot(epochs, 10_000)
    assert (plan.config.apex.stage_by, plan.config.apex.stage_length) == ("steps", plan.steps / 2)


@pytest.mark.parametrize(
    ("steps", "changes", "kwargs", "said"),
    [
        (300, {}, {}, r"max_steps: 5.0% of 300 steps are 1 for each run of 3 pairs, and under 10 tell nothing"),
        (9999, {"method": "full"}, {}, "method: full is what a pilot compares with"),
        (9999, {}, {"pairs": 2}, "pairs: 2 give no interval; at least 3"),
    ],
)
def test_what_is_refused(tmp_path, steps, changes, kwargs, said):
    with pytest.raises(UserError, match=said):
        plan_pilot(tiny_config(tmp_path, **changes), steps, **kwargs)


def test_the_length_that_is_asked_for_is_enough(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(UserError) as caught:
        plan_pilot(config, 300)
    steps = int(str(caught.value).partition("for runs of ")[2].partition(" steps")[0].replace(",", ""))
    assert plan_pilot(config, steps).steps == 10


def test_steps_of_a_run_by_epochs(tmp_path):
    config = tiny_config(tmp_path, max_steps=-1, num_train_epochs=2)
    assert planned_steps(config) == 12 == train_one(config)["steps"]


def test_a_pilot_from_its_runs_to_its_answer(tmp_path, monkeypatch):
    """Real pairs, trained in this process; the second call finds them finished."""
    trained = []

    def train(config, log, seconds, say):
        trained.append((config.method, config.seed, config.stage_starts))
        train_one(config)

    monkeypatch.setattr(process, "_train", train)
    config = tiny_config(tmp_path, max_steps=430, apex={"stages": 2}, learning_rate=3e-3, logging_steps=100)
    console = quiet()
    report = pilot(config, share=0.22, pairs=3, console=console)
    assert trained == [(m, s, () if m == "apex" else (0, 5)) for s in (0, 1, 2) for m in ("apex", "full")]
    assert report["pairs"] == 3 and report["steps"] == 10
    assert report["answer"] == judge(report["gains"], pairs=3).answer != "pays"  # or else it would go on
    assert 0.10 < report["share_used"] <= 0.15
    assert report["text"] in console.file.getvalue()
    assert report == pilot(config, share=0.22, pairs=3, console=quiet()) | {"environment": report["environment"]}
    assert len(trained) == 6
    left = {path.name for path in (tmp_path / "run-pilot").glob("*/*")}
    assert "summary.json" in left and not left & set(process.BIG)  # ten models would fill a disk
    kept = json.loads((tmp_path / "run-pilot" / "pilot.json").read_text())
    assert kept["interval"] == list(report["interval"])
    with pytest.raises(UserError, match="is of a pilot with other settings"):
        pilot(dataclasses.replace(config, learning_rate=1e-3), share=0.22, pairs=3, console=quiet())


def test_a_gain_is_checked_with_runs_of_its_own(tmp_path, monkeypatch):
    """Plain training at a higher rate, at the same seeds; its tokens count."""
    asked = []

    def record(config, settings, say):
        asked.append((config.method, config.seed, config.learning_rate, config.apex.stage_learning_rates))
        faster = config.method == "full" and config.learning_rate > 2e-3
        gain = 0.05 * (config.method == "apex") * (1 + 0.01 * config.seed)
        loss = 3.0 - gain - 0.2 * faster + 0.001 * config.seed
        return {"eval_loss_end": loss, "stage_starts": [0, 5], "tokens": config.max_steps * 4 * config.max_length}

    monkeypatch.setattr(piloting, "run_record", record)
    rates = {"stages": 2, "stage_learning_rates": (2e-3, 1e-3)}
    config = tiny_config(tmp_path, max_steps=2_000, apex=rates, learning_rate=2e-3)
    report = pilot(config, console=quiet())
    assert asked[6:] == [("full", seed, FASTER * 2e-3, (FASTER * 2e-3, FASTER * 1e-3)) for seed in (0, 1, 2)]
    assert report["gain"] == pytest.approx(0.0505) and report["over_faster"] == pytest.approx(-0.1495)
    assert report["answer"] == "does not" and report["share_used"] <= 0.05
    assert (
        report["tokens_used"]
        == 9 * report["steps"] * 4 * config.max_length + 3 * plan_pilot(config, 2_000).assessed_tokens
    )
    assert (
        "does not pay: gain +0.0505" in report["text"] and "-0.1495 (-0.1507 to -0.1483) over plain" in report["text"]
    )


def test_pairs_that_are_copies_end_it(tmp_path, monkeypatch):
    """Plain training that seeds do not change is one pair, however often it is run."""
    asked = []

    def record(config, settings, say):
        asked.append(config.method)
        return {"eval_loss_end": 3.0 - 0.05 * (config.method == "apex"), "stage_starts": [0, 5], "tokens": 1}

    monkeypatch.setattr(piloting, "run_record", record)
    report = pilot(tiny_config(tmp_path, max_steps=9_000), console=quiet())
    assert asked == ["apex", "full"] * 2 and report["answer"] == "undecided" and report["interval"] is None
    assert "no interval: pairs that are all the same" in report["text"]


def test_streams_of_one_order_are_refused(tmp_path):
    config = tiny_config(tmp_path, max_steps=9_000, streaming=True)
    for data in (config.data, config.data * 2):  # of several, the seed only says which comes first
        with pytest.raises(UserError, match="streaming: data come in one order"):
            plan_pilot(dataclasses.replace(config, data=data), 9_000)


def test_pilots_write_no_checkpoints(tmp_path):
    assert plan_pilot(tiny_config(tmp_path, max_steps=9_000), 9_000).config.save_total_limit == 0


def test_what_a_method_does_every_so_many_steps_is_scaled(tmp_path):
    """The method as planned, and not one that never chooses again."""
    scale = plan_pilot(tiny_config(tmp_path, max_steps=9_000), 9_000).steps / 9_000
    given = {
        "lift": LiftSettings(interval=3_000),
        "ist": IstSettings(interval=3_000),
        "hft": HftSettings(round_steps=3_000),
        "relora": ReloraSettings(interval=3_000, warmup=0.01, warm_start=1_500),
    }
    for method, section in given.items():
        planned = plan_pilot(tiny_config(tmp_path, max_steps=9_000, method=method, **{method: section}), 9_000).config
        scaled = getattr(planned, method)
        steps = scaled.round_steps if method == "hft" else scaled.interval
        assert steps == max(1, round(3_000 * scale)) < 100
    assert planned.relora.warm_start == round(1_500 * scale) and planned.relora.warmup == 0.01
    epochs = tiny_config(tmp_path, max_steps=-1, num_train_epochs=3.0, method="hft")
    plan = plan_pilot(epochs, 9_000)
    assert plan.config.hft.round_steps == round(plan.steps / 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distributed": DistributedConfig(strategy="fsdp2")}, "distributed.strategy: strategy fsdp2, and these runs"),
        ({"apex": {"stage_by": "epochs", "stages": 3}}, "apex.stage_by: epochs beside max_steps"),
    ],
)
def test_runs_that_no_pilot_can_be_like_are_refused(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        plan_pilot(tiny_config(tmp_path, max_steps=9_000, **changes), 9_000)


def test_a_changed_default_runs_again(tmp_path, monkeypatch):
    ran = []

    def record(config, settings, say):
        ran.append(config.method)
        loss = 3.0 + 0.05 * (config.method == "apex") * (1 + 0.01 * config.seed) + 0.001 * config.seed
        return {"eval_loss_end": loss, "stage_starts": [0, 5], "tokens": 1, "settings": settings}

    monkeypatch.setattr(piloting, "run_record", record)
    config = tiny_config(tmp_path, max_steps=9_000)
    pilot(config, console=quiet())
    pilot(config, console=quiet())
    assert len(ran) == 6
    kept = tmp_path / "run-pilot" / "seed1.json"
    old = json.loads(kept.read_text())
    old["record"]["settings"]["adam_beta2"] = 0.5  # what was the default then
    kept.write_text(json.dumps(old))
    pilot(config, console=quiet())
    assert ran[6:] == ["apex"]


def test_a_run_that_fails_ends_it(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RunFailed("the loss is NaN")

    monkeypatch.setattr(piloting, "run_record", fail)
    with pytest.raises(UserError, match="a run of the pilot failed: the loss is NaN"):
        pilot(tiny_config(tmp_path, max_steps=9_000), console=quiet())


def test_command_line(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(piloting, "pilot", lambda config, **given: asked.append((config.max_steps, given)))
    run = ["pilot", "--model", "tiny-llama", "--data", "d.txt", "max_steps=7"]
    assert cli.main(run) == 0
    assert cli.main([*run, "--minimum-effect", "0.01", "--pairs", "4", "--share", "0.1"]) == 0
    assert asked == [(7, {}), (7, {"minimum_effect": 0.01, "pairs": 4, "share": 0.1})]
    with pytest.raises(SystemExit):
        cli.main([*run, "--minimum-effect", "-1"])
    assert "must not be negative" in capsys.readouterr().err
