"""Pruning and training in turn: sizes, steps, one schedule and one order of data over all phases."""

import dataclasses
import io
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import model_with_dropout
from tiny_shrinks import ORIGINAL, assert_same_tensors, quiet_shrink, read_lines, tiny_shrink
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlm import cli
from graftlm.checkpointing import load_tensors_and_metadata
from graftlm.errors import UserError
from graftlm.files import locked
from graftlm.held_out import mean_loss
from graftlm.models import load_model, load_tokenizer
from graftlm.pruning.calibration import calibration_from
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.shrink import phase_pruning
from graftlm.pruning.shrink.config import load_shrink
from graftlm.pruning.shrink.dry_run import dry_run
from graftlm.pruning.shrink.phase_pruning import prune_settings
from graftlm.pruning.shrink.phases import Phase, default_interleaves, ends_of, least_steps, phases_of, sizes_of
from graftlm.pruning.shrink.run import plan_phases, run_shrink
from graftlm.pruning.targets import apportioned, find_target
from graftlm.training.config import DistillationConfig, SourceConfig
from graftlm.training.data import prepare_data
from graftlm.training.run import train_one

ROOT = Path(__file__).parents[1]

# --- arithmetic ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(0, 1000), st.sampled_from(["growing", "equal"]))
@settings(max_examples=50, deadline=None)
def test_steps_follow_equation_11(count, more, shares):
    steps = count * (count + 1) + more
    ends = ends_of(steps, count, shares)
    assert ends[-1] == steps
    for i, (first, end) in enumerate(itertools.pairwise([0, *ends])):
        share = 2 * (i + 1) / (count * (count + 1)) if shares == "growing" else 1 / count
        assert end - first == pytest.approx(steps * share, abs=1)
        assert end > first


@given(st.integers(2, 10**10), st.floats(0.05, 1), st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_sizes_end_exactly_at_the_target(original, share, count):
    target = max(1, int(original * share))
    for schedule in ("geometric", "linear"):
        sizes = sizes_of(original, target, count, schedule)
        assert len(sizes) == count
        assert sizes[-1] == target
        assert sizes == sorted(sizes, reverse=True)
        for i, (before, after) in enumerate(itertools.pairwise([original, *sizes])):
            if schedule == "linear":
                assert before - after == pytest.approx((original - target) / count, abs=1)
            else:
                assert after == pytest.approx(original * (target / original) ** ((i + 1) / count), abs=1)


def test_five_percent_a_phase():
    assert default_interleaves(350, 125) == 20  # the paper's
    assert default_interleaves(100, 100) == 1


def test_too_few_steps_say_how_many():
    with pytest.raises(UserError, match="max_steps: 20 steps are too few for 20 phases with growing shares") as error:
        phases_of(100, 50, 20, interleaves=20, schedule="geometric", shares="growing")
    needed = int(str(error.value).partition("give at least ")[2].partition(",")[0])
    assert all(p.steps >= 1 for p in phases_of(100, 50, needed, interleaves=20, schedule="linear", shares="growing"))
    with pytest.raises(UserError):
        phases_of(100, 50, needed - 1, interleaves=20, schedule="geometric", shares="growing")


@pytest.mark.parametrize("shares", ["growing", "equal"])
@given(st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_fewest_steps_are_those_that_a_search_finds(shares, count, more):
    def all_train(steps):
        return all(first < end for first, end in itertools.pairwise([0, *ends_of(steps, count, shares)]))

    least = least_steps(count, shares)
    assert least == next(steps for steps in itertools.count() if all_train(steps))
    assert all_train(least + more)


def test_tokens_that_are_too_few_are_named(tmp_path):
    with pytest.raises(UserError, match="tokens: 1 steps of 256 are too few for 3 phases") as error:
        plan_phases(tiny_shrink(tmp_path, max_steps=None, tokens=100))
    needed = int(str(error.value).partition("give at least ")[2].partition(",")[0])
    assert len(plan_phases(tiny_shrink(tmp_path, max_steps=None, tokens=needed))["phases"]) == 3
    with pytest.raises(UserError, match="max_steps: 9 steps are too few for 5000 phases"):  # at once
        plan_phases(tiny_shrink(tmp_path, max_steps=9, interleaves=5000))


# --- whole shrinks ---------------------------------------------------------------------------------------------------


def test_without_pruning_phases_are_one_plain_run(tmp_path):
    """Data order, schedule, moments, random numbers: T phases that keep everything train as one run does."""
    model = model_with_dropout(tmp_path / "dropout")
    task = tiny_shrink(tmp_path, model=model, target_parameters=ORIGINAL, keep_moments=True, keep="all", shares="equal")
    summary = quiet_shrink(task)
    plain = dataclasses.replace(task.run, output_dir=str(tmp_path / "plain"))
    train_one(plain, lean=True)
    assert_same_tensors(tmp_path / "run/model/model.safetensors", tmp_path / "plain/model/model.safetensors")
    ours = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if line["event"] == "train"]
    theirs = [line for line in read_lines(tmp_path / "plain/metrics.jsonl") if line["event"] == "train"]
    assert [line.pop("phase") for line in ours] == [1] * 4 + [2] * 4 + [3] * 4
    assert ours == theirs
    name = "checkpoints/step-12/optimizer.safetensors"
    assert_same_tensors(tmp_path / "run/phase_03/train" / name, tmp_path / "plain" / name)
    other = summary["eval_loss_start"] - summary["eval_loss_end"]
    assert other > 0.1  # it did train


@pytest.mark.parametrize("recovery", ["plain", pytest.param("apex", marks=pytest.mark.slow)])
def test_phases_prune_train_and_go_on(recovery, tmp_path):
    """Exact sizes, one warmup-stable-decay schedule, consecutive steps, a model that opens everywhere."""
    task = tiny_shrink(tmp_path, recovery=recovery)
    summary = quiet_shrink(task)
    plan = json.loads((tmp_path / "run/phases.json").read_text())
    sizes = sizes_of(ORIGINAL, 160_000, 3, "geometric")
    assert [phase["parameters"] for phase in plan["phases"]] == sizes
    one_component = 64 * 32 * 2 + 64 * 16 * 2  # more than any of tiny-llama's has
    for phase, size in zip(summary["phases"], sizes, strict=True):
        assert size - one_component < phase["parameters"] <= size
    assert summary["parameters"] == summary["phases"][-1]["parameters"]
    assert [phase["steps"] for phase in summary["phases"]] == [2, 4, 6]
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    trained = [line for line in lines if line["event"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert summary["tokens"] == trained[-1]["tokens"] == sum(phase["tokens"] for phase in summary["phases"])
    rates = [line["learning_rate"] for line in trained]
    # 5% of 12 steps are one of warmup, from a tenth; 10% are two of linear decay, to a tenth
    assert rates == pytest.approx([1e-4, *[1e-3] * 9, 1e-3, 5.5e-4])
    pruned = [line for line in lines if line["event"] == "prune"]
    assert [(line["phase"], line["step"]) for line in pruned] == [(1, 0), (2, 2), (3, 6)]
    assert all(math.isfinite(line["loss_after"]) for line in pruned)
    assert summary["eval_loss_end"] < summary["eval_loss_start"]
    folder = tmp_path / "run/model"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == load_tokenizer("tiny-llama").get_vocab()
    card = (folder / "README.md").read_text()
    assert "in 3 phases of pruning (Adapt-Pruner)" in card
    assert all(f"| {phase['phase']} | {phase['parameters']:,} |" in card for phase in summary["phases"])
    assert not list((tmp_path / "run").rglob("phase_*/**/*.safetensors"))  # keep: last


def test_moments_survive_pruning(tmp_path):
    """The moments that a phase begins with are those that the phase before ended with, of what is left."""
    quiet_shrink(tiny_shrink(tmp_path, keep_moments=True, keep="all", interleaves=2))
    ended = tmp_path / "run/phase_01/train"
    begins = tmp_path / "run/phase_02/pruned"
    old, metadata = load_tensors_and_metadata(ended / "checkpoints/step-4/optimizer.safetensors")
    names = metadata["extra"]["run"]["parameters"]
    new = load_tensors_and_metadata(begins / "start/phase.safetensors")[0]
    before, after = load_file(ended / "model/model.safetensors"), load_file(begins / "model.safetensors")
    cut = 0
    for number, name in enumerate(names):
        a, b = before[name], after[name]
        moment, kept = old[f"{number}.exp_avg"], new[f"exp_avg/{name}"]
        assert kept.shape == b.shape
        if a.shape == b.shape:
            assert torch.equal(kept, moment)
            continue
        cut += 1
        dim = next(i for i in range(a.dim()) if a.shape[i] != b.shape[i])
        rows = a.unbind(dim)
        for i, row in enumerate(b.unbind(dim)):  # what stays has its own moments, found by its weights
            [place] = [j for j, one in enumerate(rows) if torch.equal(one, row)]
            assert torch.equal(kept.select(dim, i), moment.select(dim, place))
    assert cut > 10


@pytest.mark.slow
def test_without_kept_moments_the_optimizer_is_new(tmp_path):
    quiet_shrink(tiny_shrink(tmp_path, keep="all", interleaves=2))
    tensors, metadata = load_tensors_and_metadata(tmp_path / "run/phase_02/pruned/start/phase.safetensors")
    assert not tensors
    assert metadata["extra"]["scheduler"]["last_epoch"] == 4
    ended = load_tensors_and_metadata(tmp_path / "run/phase_02/train/checkpoints/step-12/optimizer.safetensors")[0]
    assert float(ended["0.step"]) == 8


def test_apex_begins_anew_in_every_phase(tmp_path):
    """Its stages are laid out over the phase, and N is chosen among what is left."""
    quiet_shrink(
        tiny_shrink(tmp_path, recovery="apex", shares="equal", train={"apex": {"stages": 2, "assess_samples": 4}})
    )
    for number in (1, 2, 3):
        train = tmp_path / f"run/phase_{number:02d}/train"
        told = json.loads((train / "summary.json").read_text())
        assert [(stage["step"], stage["steps"]) for stage in told["stages"]] == [
            (4 * number - 4, 2),
            (4 * number - 2, 2),
        ]
        shapes = json.loads((train.parent / "pruned/phase.json").read_text())["shapes"]
        for stage in told["stages"]:
            for layer, choice in stage["channels"].items():
                both = [*choice["advantageous"], *choice["disadvantageous"]]
                assert max(both) < shapes[int(layer)]["intermediate_size"]
        stages = [line["stage"] for line in read_lines(train / "metrics.jsonl") if line["event"] == "train"]
        assert stages == [0, 0, 1, 1]


@pytest.mark.parametrize("phases", [1, 4, 20, 49])
def test_phases_share_out_the_iterations(phases, tmp_path):
    """With a fixed amplitude it is all of them that say how far layers move apart."""
    task = tiny_shrink(tmp_path, prune={"iterations": None})
    each = [
        prune_settings(task, Phase(number, parameters=1000, first=0, end=1), phases).iterations
        for number in range(1, phases + 1)
    ]
    assert sum(each) == 50 and max(each) - min(each) <= 1
    many = [prune_settings(task, Phase(number, 1000, 0, 1), 60).iterations for number in range(1, 61)]
    assert set(many) == {1}


def test_no_two_phases_of_any_trials_draw_the_same(tmp_path):
    """Else trial 1's first phase would measure on what trial 0's second has measured on."""
    seeds = []
    for trial in (0, 1, 2):
        task = tiny_shrink(tmp_path, prune={"seed": trial})
        phases = [Phase(number, parameters=1000, first=0, end=1) for number in (1, 2, 3)]
        own = [prune_settings(task, phase, 3).seed for phase in phases]
        assert own[0] == trial  # a shrink of one phase draws what its seed says
        seeds += own
    assert len(set(seeds)) == 9


def test_the_uniform_control_is_named(tmp_path):
    told = io.StringIO()
    task = tiny_shrink(tmp_path, interleaves=1, max_steps=1, prune={"amplitude": 0.5})
    summary = run_shrink(task, console=Console(file=told, width=200))
    assert any(shape != summary["shapes"][0] for shape in summary["shapes"])
    command = f"graftlm shrink {task.folder}/config.yaml prune.uniform=true output_dir={task.folder}-uniform"
    assert f"compare it with its uniform control: {command}" in told.getvalue().replace("\n", " ")
    words = command.split()[2:]
    control = load_shrink(words[0], words[1:])  # the command as it stands
    assert control.prune.uniform and control.settings.target_parameters == task.settings.target_parameters
    told = io.StringIO()
    uniform = run_shrink(control, console=Console(file=told, width=200))
    further = {"model": str(task.folder / "model"), "target_parameters": 150_000, "prune": {"uniform": True}}
    again = tiny_shrink(tmp_path / "again", interleaves=1, max_steps=1, **further)
    shapes = run_shrink(again, console=Console(file=told, width=200))["shapes"]
    assert any(shape != shapes[0] for shape in shapes)  # they differed already
    assert uniform["parameters"] <= task.settings.target_parameters and "uniform control" not in told.getvalue()


def test_one_interleave_prunes_first_and_then_trains(tmp_path):
    summary = quiet_shrink(tiny_shrink(tmp_path, interleaves=1, target_parameters=None, sparsity=0.3, max_steps=4))
    [phase] = summary["phases"]
    assert (phase["first_step"], phase["steps"]) == (0, 4)
    assert phase["parameters"] == summary["parameters"] <= summary["target_parameters"]
    alone = load_model("tiny-llama")
    found = find_target(alone, PruneSettings(sparsity=0.3), uniform=False)
    assert summary["target_parameters"] == ORIGINAL - found.original + found.budget


def test_distillation_from_the_original(tmp_path):
    task = tiny_shrink(
        tmp_path, max_steps=3, interleaves=2, distillation=DistillationConfig(teacher="original", weight=0.5)
    )
    assert task.run.distillation.teacher == "tiny-llama"
    summary = quiet_shrink(task)
    assert summary["distillation"]["teacher"] == "original"
    assert "learned from the predictions of `tiny-llama`" in (tmp_path / "run/model/README.md").read_text()


# --- before anything is pruned ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_parameters": 10**9}, "is above the model's 214,080"),
        ({"target_parameters": 10}, "is more than can go"),
        ({"target_parameters": 60_000, "prune": {"method": "shortgpt", "iterations": None}}, "which leaves 66,240"),
        ({"prune": {"method": "slicegpt", "iterations": None}}, "slicegpt prunes a model only once"),
        ({"prune": {"method": "shortgpt", "iterations": None}, "keep_moments": True}, "moments cannot survive it"),
        ({"prune": {"method": "sheared", "iterations": None}, "keep_moments": True}, "moments cannot survive it"),
        ({"prune": {"method": "flap", "iterations": None}, "keep_moments": True}, "or prune.flap_compensation: false"),
        ({"train": {"optim": "adafactor"}, "keep_moments": True}, "the state of optim: adafactor cannot be cut"),
        ({"max_steps": 3}, "max_steps: 3 steps are too few for 3 phases"),
        ({"train": {"save_total_limit": 0}}, "train.save_total_limit: each phase goes on from a checkpoint"),
    ],
)
def test_what_cannot_be_is_said_first(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        quiet_shrink(tiny_shrink(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"method": "flap", "iterations": 3}, "flap prunes in one step"),
        ({"method": "shortgpt", "iterations": None, "heads_by": "loss"}, "leave out heads_by"),
        ({"method": "sheared", "iterations": None, "uniform": False}, "makes all layers alike"),
        ({"method": "slicegpt", "iterations": None, "uniform": False}, "takes the same of all"),
        ({"method": "slicegpt", "iterations": None, "width_multiple": 7}, "no multiple of 7"),
        ({"sample_length": 4096}, "sample_length 4096 is above the model's context of 2048 tokens"),
        ({"method": "flap", "iterations": None, "min_channels": 153}, "512 of them biases"),
    ],
)
def test_what_a_method_cannot_do_is_said_before_anything_is_read(prune, message, tmp_path):
    task = tiny_shrink(tmp_path, interleaves=1, prune=prune)
    with pytest.raises(UserError, match=message):
        plan_phases(task)
    with pytest.raises(UserError, match=message):
        dry_run(task)


def test_a_sliced_student_learns_from_the_original(tmp_path):
    task = tiny_shrink(
        tmp_path,
        max_steps=2,
        interleaves=1,
        prune={"method": "slicegpt", "iterations": None},
        distillation=DistillationConfig(teacher="original", weight=0.5),
    )
    assert quiet_shrink(task)["parameters"] <= 160_000


def test_sizes_below_all_components_are_left_to_methods_that_take_others(tmp_path):
    slicing = {"prune": {"method": "slicegpt", "iterations": None}, "interleaves": 1}
    assert plan_phases(tiny_shrink(tmp_path, target_parameters=40_000, **slicing))["target_parameters"] == 40_000
    with pytest.raises(UserError, match="is more than can go"):
        plan_phases(tiny_shrink(tmp_path, target_parameters=40_000))


def test_a_mistake_can_be_mended_where_nothing_was_pruned_yet(tmp_path):
    with pytest.raises(UserError, match="an iteration needs 100000"):
        quiet_shrink(tiny_shrink(tmp_path, prune={"samples": 100_000}))
    assert (tmp_path / "run/phases.json").exists()
    summary = quiet_shrink(tiny_shrink(tmp_path, interleaves=1, max_steps=1))
    assert len(summary["phases"]) == 1


def test_what_lies_elsewhere_is_the_same(tmp_path):
    task = tiny_shrink(tmp_path, interleaves=1, max_steps=1)
    summary = quiet_shrink(task)
    moved = Path(task.settings.data[0].path).rename(tmp_path / "moved.jsonl")

    def given(path, weight=None, **train):
        source = dataclasses.replace(task.settings.data[0], path=str(path), weight=weight)
        again = tiny_shrink(tmp_path, interleaves=1, max_steps=1, data=(source,), train=train)
        Path(task.settings.data[0].path).unlink()  # tiny_shrink has written it once more
        return again

    assert quiet_shrink(given(moved, save_steps=7, cache_dir=str(tmp_path / "new"))) == summary
    with pytest.raises(UserError, match=r"data was .* and is now"):
        quiet_shrink(given(moved, weight=2.0))
    with pytest.raises(UserError, match=r"train\.learning_rate was"):
        quiet_shrink(given(moved, learning_rate=0.5))


def test_only_one_at_a_time(tmp_path):
    task = tiny_shrink(tmp_path)
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"), pytest.raises(UserError, match="another shrink is running there"):
        quiet_shrink(task)


@pytest.mark.parametrize(("given", "message"), [("file", "is a file"), ("folder", "holds something else")])
def test_foreign_folders_are_left_alone(given, message, tmp_path):
    task = tiny_shrink(tmp_path)
    if given == "folder":
        (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note" if given == "folder" else tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match=message):
        quiet_shrink(task)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsity: 0.5\nmax_steps: 10\ntokens: 9", "max_steps: give it or tokens"),
        ("sparsity: 0.5", "max_steps: give it or tokens"),
        ("max_steps: 9", "target_parameters: give it or sparsity"),
        ("sparsity: 1.5\nmax_steps: 9", ":3: sparsity: 1.5 must be between 0 and 1"),
        ("sparsity: 0.5\nmax_steps: 9\ninterleave: 3", ":5: unknown key 'interleave' .did you mean interleaves"),
        ("sparsity: 0.5\nmax_steps: 9\ntrain: {model: x}", ":5: train.model: it is given at the top"),
        (
            "sparsity: 0.5\nmax_steps: 9\ntrain:\n  learning_rat: 1",
            ":6: unknown key 'train.learning_rat' .did you mean train",
        ),
        ("sparsity: 0.5\nmax_steps: 9\nprune:\n  sparsity: 0.2", ":6: prune.sparsity: the phases have sizes"),
        (
            "sparsity: 0.5\nmax_steps: 9\nprune:\n  methd: adapt",
            ":6: unknown key 'prune.methd' .did you mean prune.method",
        ),
        ("sparsity: 0.5\nmax_steps: 9\nprune:\n  samples: -1", ":6: prune.samples: -1 must be at least 1"),
        ("sparsity: 0.5\nmax_steps: 9\nprune:\n  preset: magic", ":6: prune.preset: 'magic' is not known"),
        (
            "sparsity: 0.5\nmax_steps: 9\nprune:\n  exact: false",
            ":6: prune.exact: every phase has a number of parameters",
        ),
        ("target_parameters: 9\nmax_steps: 9\nprune:\n  exact: false", ":6: prune.exact: every phase has a number"),
        (
            "sparsity: 0.5\nmax_steps: 9\nrecovery: apex\ntrain:\n  apex: {rewarmup_ratio: 0.1}",
            "train.apex.rewarmup_ratio: the phases share one schedule",
        ),
        ("sparsity: 0.5\nmax_steps: 9\ndistillation: {weight: 2}", "distillation.weight: 2.0 must be above 0"),
    ],
)
def test_errors_name_file_line_and_key(text, message, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"model: tiny-llama\ndata: x.txt\n{text}\n")
    with pytest.raises(UserError, match=message) as error:
        load_shrink(file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lr=1e-3", "unknown key 'lr' (did you mean train.learning_rate?)"),
        ("max_lenght=9", "unknown key 'max_lenght' (did you mean train.max_length?)"),
        ("method=flap", "unknown key 'method' (did you mean prune.method?)"),
        ("interleave=2", "unknown key 'interleave' (did you mean interleaves?)"),
        ("train.apex.k_head=0.5", "unknown key 'train.apex.k_head' (did you mean train.apex.k_heads?)"),
        ("train.apex.stages=0", "train.apex.stages: 0 must be at least 1"),
        ("prune.method=adapter", "prune.method: 'adapter' must be adapt (the nearest), or one of "),
        ("train=5", "train: must be a mapping, e.g. {learning_rate: 1e-4}"),
        ("prune=[1]", "prune: must be a mapping, e.g. {samples: 64}"),
    ],
)
def test_errors_name_keys_as_the_file_has_them(word, said, tmp_path):
    """So that what they advise is taken."""
    file = tmp_path / "c.yaml"
    file.write_text("model: tiny-llama\ndata: x.txt\nsparsity: 0.5\nmax_steps: 9\n")
    with pytest.raises(UserError, match=f"^command line: {re.escape(said)}"):
        load_shrink(file, [word])


def test_sizes_may_be_written_as_people_do(tmp_path):
    file = tmp_path / "c.yaml"
    for written, count in {"100M": 10**8, "1.5k": 1500, "160_000": 160_000, "2e5": 200_000}.items():
        file.write_text(f"model: tiny-llama\ndata: x.txt\nmax_steps: 9\ntarget_parameters: {written}\n")
        assert load_shrink(file).settings.target_parameters == load_shrink(file).prune.target_parameters == count
        assert load_shrink(file, ["target_parameters=1B"]).settings.target_parameters == 10**9
        file.write_text(f"model: tiny-llama\ndata: x.txt\ntarget_parameters: 1M\ntokens: {written}\n")
        assert load_shrink(file).settings.tokens == count


def test_config_reads_back_equal(tmp_path):
    task = tiny_shrink(tmp_path, recovery="apex", distillation=DistillationConfig(teacher="original"))
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(task.to_dict()))
    again = load_shrink(file)
    assert again.run == task.run
    assert again.prune == task.prune
    assert again.to_dict() == task.to_dict()


def test_a_config_read_back_may_have_another_length(tmp_path):
    """The decay follows the length, unless it was given."""
    kwargs = {"num_decay_steps": 3}
    for train, decay in (({}, (2, 4)), ({"lr_scheduler_kwargs": kwargs}, (3, 3))):
        task = tiny_shrink(tmp_path, train=train)
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump(task.to_dict()))
        runs = [load_shrink(file, words).run for words in ((), ("max_steps=40",))]
        assert tuple(run.lr_scheduler_kwargs["num_decay_steps"] for run in runs) == decay
    file.write_text(yaml.safe_dump(tiny_shrink(tmp_path).to_dict()))
    assert load_shrink(file, ["train.lr_scheduler_type=cosine"]).run.lr_scheduler_kwargs is None


def test_tokens_become_steps(tmp_path):
    task = tiny_shrink(tmp_path, max_steps=None, tokens=2560)
    assert task.run.max_steps == 10  # of 4 sequences of 64


def test_data_may_be_streamed(tmp_path):
    summary = quiet_shrink(tiny_shrink(tmp_path, max_steps=3, interleaves=2, train={"streaming": True}))
    assert summary["steps"] == 3
    assert not list((tmp_path / "cache").rglob("*.arrow"))  # nothing is tokenised that is not read


def test_pruning_sees_no_document_that_is_held_out(tmp_path):
    task = tiny_shrink(tmp_path, eval_data=(), prune={"samples": 1, "sample_length": 16}, train={"eval_fraction": 0.3})
    tokenizer = load_tokenizer("tiny-llama")

    def drawn(**given):
        found = calibration_from(tokenizer, task.prune, task.settings.data, cache_dir=task.run.cache_dir, **given)
        rows = [found.sequences[int(n)]["input_ids"] for n in [*found.numbers, *found.held_back]]
        return {tuple(row.tolist()) for row in rows}

    held = prepare_data(dataclasses.replace(task.run, max_length=16, packing=False), tokenizer).evaluation
    held = {tuple(held[i]["input_ids"].tolist()) for i in range(len(held))}
    assert held & drawn()
    left = drawn(held_back=task.run)
    assert left and not held & left
    streamed = drawn(held_back=task.run, streaming=True)
    assert streamed == left


def test_pruning_sees_nothing_of_the_end_of_a_document_that_is_held_out(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(" ".join(str(number) for number in range(20_000)))
    given = {"samples": 4, "sample_length": 16}
    data = (SourceConfig(str(book)),)
    task = tiny_shrink(tmp_path, data=data, eval_data=(), prune=given, train={"eval_max_blocks": 30})
    tokenizer = load_tokenizer("tiny-llama")
    blocks = prepare_data(task.run, tokenizer).evaluation
    held = np.concatenate([blocks[i]["input_ids"] for i in range(len(blocks))]).tolist()
    found = calibration_from(
        tokenizer, task.prune, data, cache_dir=task.run.cache_dir, task=task.run.task, held_back=task.run
    )
    rows = [found.sequences[int(n)]["input_ids"].tolist() for n in [*found.numbers, *found.held_back]]
    whole = tokenizer(book.read_text())["input_ids"]
    text = tokenizer.decode(held)
    assert len(held) > 30 * 16 and "19998" in text
    assert not [row for row in rows if tokenizer.decode(row) in text]
    assert len(rows) > 0.9 * (len(whole) - len(held)) / 16


def test_uniform_phases_take_heads_as_pruning_at_once_does(tmp_path):
    """Whole groups are rounded on the original's: each phase alone would round to as many as it was given."""
    given = {"target_parameters": 120_000, "interleaves": 6, "prune": {"uniform": True, "samples": 2}}
    summary = quiet_shrink(tiny_shrink(tmp_path, **given))
    settings = PruneSettings(target_parameters=120_000, uniform=True)
    model = load_model("tiny-llama")
    target = find_target(model, settings, uniform=True)
    heads, channels = (
        apportioned(one, one.counts, None, budget)[0] for one, budget in zip(target.sizes, target.by_kind, strict=True)
    )
    assert heads < model.config.num_key_value_heads
    shapes = {(shape["num_key_value_heads"], shape["intermediate_size"]) for shape in summary["shapes"]}
    assert shapes == {(heads, channels)}


def test_held_out_losses_of_phases_need_no_table_of_logits(tmp_path, monkeypatch):
    logits = []

    def heard(model, batches):
        batches = list(batches)
        logits.append(model(**batches[0]).logits)
        return mean_loss(model, batches)

    monkeypatch.setattr(phase_pruning, "mean_loss", heard)
    quiet_shrink(tiny_shrink(tmp_path, interleaves=2, max_steps=3))
    assert logits == [None] * 3  # before anything, and after each pruning


def test_dry_run_counts_what_pruning_sees(tmp_path):
    def seconds(**prune):
        phase = dry_run(tiny_shrink(tmp_path, prune={"iterations": None, **prune}))["phases"][0]
        return phase["prune_seconds"] / phase["seconds"]  # each has measured a step of its own

    once = seconds(method="flap")
    assert seconds(method="random") == 0
    assert seconds(method="sheared") > 20 * once  # its default is 100 steps
    assert seconds(method="llm-pruner", heads_by="loss") > 1.5 * seconds(method="llm-pruner")


def test_dry_run_tells_sizes_steps_time_and_memory(tmp_path, capsys):
    task = tiny_shrink(tmp_path)
    told = dry_run(task)
    assert [(phase["first"], phase["end"]) for phase in told["phases"]] == [(0, 2), (2, 6), (6, 12)]
    assert told["phases"][-1]["parameters"] == 160_000
    assert told["tokens"] == 12 * 4 * 64
    assert told["seconds"] > 0
    assert all(phase["calibration_tokens"] == 2 * 4 * 64 for phase in told["phases"])
    assert told["peak_memory_bytes"] > 4 * 4 * ORIGINAL  # weights, gradients, two moments
    shown = capsys.readouterr().out
    assert "7 to 12" in shown
    assert not (tmp_path / "run").exists()


def test_phase_without_its_checkpoint_is_refused(tmp_path):
    task = tiny_shrink(tmp_path)
    with pytest.raises(UserError, match="a phase that begins at step 4 goes on from a checkpoint"):
        train_one(dataclasses.replace(task.run, phase=(4, 8)))


@pytest.mark.slow
def test_example_shrinks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = [f"output_dir={tmp_path}/run", f"train.cache_dir={tmp_path}/cache", "data.path=src/graftlm/training/data"]
    assert cli.main(["shrink", "examples/shrink_tiny.yaml", *words, "max_steps=10", "train.max_length=64"]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["parameters"] <= 150_000
    assert len(summary["phases"]) == 4
    assert cli.main(["shrink", "examples/shrink_tiny.yaml", *words, "max_steps=10", "train.max_length=64"]) == 0
    assert "is finished; nothing to do" in capsys.readouterr().err
