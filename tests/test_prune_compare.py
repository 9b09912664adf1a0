"""graftlm compare on ways of pruning: configs, equal sizes, cells that are kept, tables, processes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, tiny_model
from tiny_prune_comparisons import opened, quiet, write_comparison
from tiny_runs import write_texts

from graftlm import cli, config_docs
from graftlm.comparing.loop import alone
from graftlm.comparing.process import OutOfTime, RunFailed
from graftlm.comparing.pruning import runner, work
from graftlm.comparing.pruning.config import PruneCompareConfig, load_prune_comparison
from graftlm.comparing.pruning.jobs import PruneJob, changed
from graftlm.comparing.runner import compare
from graftlm.comparing.tasks import Tasks
from graftlm.content import file_sha256
from graftlm.errors import UserError
from graftlm.evaluation.run import run_evaluation
from graftlm.files import read_json, write_json
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.surgery import keep_components, prunable_blocks
from graftlm.pruning.targets import parameters_left

ROOT = Path(__file__).parents[1]
START = "model: tiny-llama\nperplexity: a.txt\nsparsities: [0.4]\n"


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells run here, which saves each two starts of Python. Returns the folders in the order of pruning."""
    pruned = []

    def do(given, log, seconds, say):
        pruned.append(given.parent.name)
        work.work(read_json(given), given.parent)

    def evaluate(model, out, options, log, seconds, say):
        asked = cli.parse(["eval", model, *options, "--out", str(out)])
        return run_evaluation(
            model, out, perplexity=asked.perplexity, max_length=asked.max_length, dtype=asked.dtype, progress=False
        )

    monkeypatch.setattr(runner, "_work", do)
    monkeypatch.setattr(runner, "evaluate", evaluate)
    return pruned


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prune: {}\nvariants: {a: {methd: adapt}}\n", "c.yaml:5: unknown key 'methd' (did you mean method?)"),
        ("prune: {}\nvariants: {a: {method: adpt}}\n", "c.yaml:5: method: 'adpt' must be adapt (the nearest)"),
        ("prune: {}\nvariants: {a: {sparsity: 0.2}}\n", "c.yaml:5: variants.a.sparsity: give sparsities at the top"),
        ("prune: {seed: 1}\nvariants: {a: {}}\n", "c.yaml:4: prune.seed: give seeds at the top"),
        ("prune: {exact: false}\nvariants: {a: {}}\n", "c.yaml:4: prune.exact: sparsity_of"),
        ("prune: {iterations: 0}\nvariants: {a: {}}\n", "c.yaml:4: iterations: 0 must be at least 1"),
        ("prune: {}\nvariants: {a: {samples: -1}}\n", "c.yaml:5: samples: -1 must be at least 1"),
        ("data: b\nshrink: {max_steps: 4}\nvariants: {a: {prune: {samples: -1}}}\n", "c.yaml:6: prune.samples: -1"),
        ("prune: {}\nvariants: {original: {}}\n", "c.yaml:5: variants.original: the model before pruning"),
        ("prune: {}\nvariants: {}\n", "c.yaml:5: variants: there is none"),
        ("prune: {}\nvariants: {a: {}}\ncontrol: b\n", "c.yaml:6: control: b is none of the variants a"),
        ("prune: {}\nvariants: {a: {}}\nsede: [0]\n", "c.yaml:6: unknown key 'sede' (did you mean seeds?)"),
        ("prune: {}\nvariants: {a: {}}\nbase: {}\n", "c.yaml:6: unknown key 'base'"),
        ("variants: {a: {}}\nshrink: {}\n", "c.yaml: data: a shrink trains; name its data"),
        ("prune: {}\nshrink: {}\nvariants: {a: {}}\n", "c.yaml:5: shrink: give it or prune, one of the two"),
        ("shrink: {max_steps: 4}\nvariants: {a: {recovry: apex}}\ndata: b\n", "c.yaml:5: unknown key 'recovry'"),
        ("shrink: {max_steps: 4, train: {seed: 1}}\nvariants: {a: {}}\ndata: b\n", "c.yaml:4: shrink.train.seed: give"),
        ("shrink: {}\nvariants: {a: {}}\ndata: b\nsparsity_of: channels\n", "c.yaml:7: sparsity_of: a shrink's sizes"),
    ],
)  # fmt: skip
def test_what_is_refused(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(START + text)
    Path("a.txt").write_text("words")
    with pytest.raises(UserError) as caught:
        compare("c.yaml", dry_run=True)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sparsities=[0.2,1.0]", "sparsities: [0.2, 1.0] must all lie between 0 and 1"),
        ("sparsities=[]", "sparsities: there is no size to prune to"),
        ("seeds=[1,1]", "seeds: [1, 1] has a value twice"),
        ("target_parameters=[0]", "target_parameters: 0 must be at least 1"),
        ("task_batch_size=0", "task_batch_size: 0 must be at least 1"),
        ("perplexity=[a/t.txt,b/t.txt]", "perplexity: two texts have the same file name"),
    ],
)
def test_values_that_are_refused(override, said, tmp_path):
    with pytest.raises(UserError, match=r"^command line: ") as caught:
        load_prune_comparison(write_comparison(tmp_path), [override])
    assert said in str(caught.value)


def test_sizes_settings_and_control(tmp_path):
    variants = {"slow": {"iterations": 9}, "code": {"preset": "authors-code", "sample_length": 16}, "u": None}
    path = write_comparison(tmp_path, variants=variants, target_parameters=[150_000], seeds=[3], control="u")
    comparison, cells = opened(path)
    assert [size.label for size in comparison.sizes] == ["40%", "150000 parameters"]
    assert opened(path, "target_parameters=[150k]")[0].sizes == comparison.sizes
    jobs = {(c.arm, c.size.label): c.job.settings for c in cells.wanted() if c.job}
    assert jobs["slow", "40%"].iterations == 9 and jobs["u", "40%"].iterations == 2
    # A preset lies under what is given, whether in the variant or for all.
    assert (jobs["code", "40%"].samples, jobs["code", "40%"].sample_length) == (4, 16)
    assert jobs["u", "150000 parameters"].target_parameters == 150_000
    assert all(one.seed == 3 and one.exact for one in jobs.values())
    assert comparison.control == "u"
    alone_preset = write_comparison(tmp_path, prune={"iterations": 2}, variants={"code": {"preset": "authors-code"}})
    assert next(c for c in opened(alone_preset)[1].wanted() if c.job).job.settings.samples == 512
    assert opened(write_comparison(tmp_path))[0].control == "uniform"
    as_published = opened(path, "sparsity_of=channels")[1]
    published = [c.job.settings for c in as_published.wanted() if c.job and c.job.settings.sparsity]
    assert published and not any(one.exact for one in published)


def test_the_control_is_the_uniform_one(tmp_path):
    """Of its method, whether it trains or not; with `uniform: false` it chooses layers like the others."""
    adapt, chosen, uniform = (
        {"method": m, "uniform": u} for m, u in (("adapt", None), *[("llm-pruner", u) for u in (False, None)])
    )
    by_name = {"adapt": adapt, "chosen": chosen, "even": uniform}
    assert opened(write_comparison(tmp_path, variants=by_name))[0].control == "even"
    without, _ = opened(write_comparison(tmp_path, variants={"adapt": adapt, "chosen": chosen}))
    assert without.control == "adapt" and any("no variant is uniform" in note for note in without.notes)
    also = {"chosen": chosen, "flap": {"method": "flap", "iterations": None, "uniform": True}}
    assert not any(
        "no variant is uniform" in note for note in opened(write_comparison(tmp_path, variants=also))[0].notes
    )
    shrinks = {name: {"prune": prune} for name, prune in by_name.items()}
    path = write_shrinks(tmp_path, variants=shrinks, control=None)
    assert opened(path)[0].control == "even"
    path = write_shrinks(tmp_path, variants={"adapt": {}}, control=None)
    assert any("{prune: {method: llm-pruner}}" in note for note in opened(path)[0].notes)


def test_keys_go_by_content(tmp_path):
    keys = [cell.key for cell in opened(write_comparison(tmp_path / "a"))[1].wanted()]
    assert len(set(keys)) == 3
    assert [cell.key for cell in opened(write_comparison(tmp_path / "b"))[1].wanted()] == keys
    for change in ("prune.samples=5", "max_length=32", "perplexity_words=9", "dtype=bfloat16"):
        assert not set(keys[1:]) & {c.key for c in opened(tmp_path / "a" / "compare.yaml", change)[1].wanted()}
    # The original has no use for calibration.
    assert next(opened(tmp_path / "a" / "compare.yaml", "prune.samples=5")[1].wanted()).key == keys[0]
    (tmp_path / "b" / "held_out.txt").write_text("other words")
    assert not set(keys) & {cell.key for cell in opened(tmp_path / "b" / "compare.yaml")[1].wanted()}


def test_a_new_setting_leaves_old_keys():
    assert changed({"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": 1}}, {"a": 1, "b": {"c": 0, "d": 3}, "e": {"f": 1}}) == {
        "b": {"c": 2}
    }


def test_settings_of_other_methods_are_no_part():
    """So a default of theirs may change without a run of this one being done again."""
    here, there = (PruneSettings(method="adapt", sparsity=0.5, sheared_steps=steps) for steps in (3, 4))
    assert PruneJob(here, "parameters").identity() == PruneJob(there, "parameters").identity()
    here, there = (PruneSettings(method="sheared", sparsity=0.5, sheared_steps=steps) for steps in (3, 4))
    assert PruneJob(here, "parameters").identity() != PruneJob(there, "parameters").identity()


def test_weights_may_be_held_in_bfloat16(in_this_process, tmp_path):
    path = write_comparison(tmp_path, seeds=[0], dtype="bfloat16", keep=True, variants={"u": {"method": "magnitude"}})
    compare(path, console=quiet())
    _, cells = opened(path)
    assert not cells.open()
    (cell,) = (cell for cell in cells.wanted() if cell.job)
    told = read_json(cells.run_folder(cell) / "model/config.json")
    assert told["dtype"] == "bfloat16"
    assert read_json(cells.run_folder(cell) / "eval.json")["dtype"] == "bfloat16"


def test_a_model_of_older_defaults_is_made_again(in_this_process, tmp_path):
    """The folder has the same name: only what it says of its settings tells."""
    path = write_comparison(tmp_path, seeds=[0], variants={"u": {"method": "magnitude"}}, keep=True)
    compare(path, console=quiet())
    _, cells = opened(path)
    (cell,) = (cell for cell in cells.wanted() if cell.job)
    folder = cells.run_folder(cell)
    told = read_json(folder / "settings.json")
    for one, again in ((told, False), ({**told, "prune": {**told["prune"], "min_groups": 0}}, True)):
        write_json(folder / "settings.json", one)
        (tmp_path / "out/results.json").unlink(missing_ok=True)
        before = (folder / runner.DONE).stat().st_mtime_ns
        compare(path, console=quiet())
        assert ((folder / runner.DONE).stat().st_mtime_ns != before) is again
        assert (folder / runner.MODEL).exists() and not (folder / "stale").exists()
        (folder / "stale").mkdir()  # of an unfinished shrink, say


def test_tasks_on_other_questions_are_asked_again(in_this_process, tmp_path, monkeypatch):
    """What a cell scored is known by the files that its questions were in."""
    questions = tmp_path / "D" / "piqa" / "test.jsonl"
    questions.parent.mkdir(parents=True)
    questions.write_text("one")
    evaluate = runner.evaluate

    def scored(model, out, options, *rest):
        report = evaluate(model, out, options, *rest)
        report["results"]["piqa"] = {"acc": 0.5, "shots": 0}
        report["data"]["piqa"] = {"piqa/test.jsonl": file_sha256(questions)}
        return report

    monkeypatch.setattr(runner, "evaluate", scored)
    monkeypatch.setattr(Tasks, "check", lambda self: None)
    monkeypatch.setattr(Tasks, "options", lambda self: [])
    path = write_comparison(tmp_path, variants={"a": {}}, tasks=["piqa"], task_data_dir=str(tmp_path / "D"))
    compare(path, console=quiet())
    assert not opened(path)[1].open()
    questions.write_text("two")
    assert len(opened(path)[1].open()) == 2
    compare(path, console=quiet())
    assert not opened(path)[1].open()


# --- equal sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_share_is_of_heads_and_channels(family):
    """Half of both, taken out, leaves what half of the share says."""
    model = tiny_model(family)
    target = parameters_left(model, 0.5)
    half = {block.name: torch.arange(block.components // 2) for block in prunable_blocks(model)}
    assert sum(p.numel() for p in keep_components(model, half).parameters()) == target


@given(count=st.integers(1, 40), lines=st.lists(st.integers(0, 6), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_the_first_words_of_a_text(tmp_path_factory, count, lines):
    folder = tmp_path_factory.mktemp("text")
    text = "\n".join(" ".join(f"w{i}_{j}" for j in range(n)) for i, n in enumerate(lines)) + "\n"
    (folder / "a.txt").write_text(text)
    (folder / "out").mkdir()
    cut = runner.measured_text(folder / "a.txt", count, folder / "out").read_text()
    assert cut.split() == text.split()[:count] and text.startswith(cut)
    assert runner.measured_text(folder / "a.txt", None, folder / "out") == folder / "a.txt"


def test_only_plain_text_is_cut(tmp_path):
    with pytest.raises(UserError, match=r"perplexity_words: .*a\.jsonl is no \.txt file"):
        runner.measured_text(tmp_path / "a.jsonl", 3, tmp_path)


# --- running ---------------------------------------------------------------------------------------------------------


def test_a_whole_comparison(in_this_process, tmp_path):
    path = write_comparison(tmp_path)
    summary = compare(path, console=quiet())
    assert [name.split("_")[0] for name in in_this_process] == ["adapt", "uniform"]
    adapt, uniform = summary["rows"]
    assert uniform["control"] and not adapt["control"]
    for row in (adapt, uniform):
        below = row["target_parameters"]["mean"] - row["parameters"]["mean"]
        assert 0 <= below <= 4 * 3 * 64  # a channel in each of 4 layers
        assert row["seconds"]["mean"] > 0 and row["peak_memory_bytes"]["mean"] > 50e6
    assert adapt["target_parameters"] == uniform["target_parameters"]
    assert adapt["perplexity"]["held_out.txt"]["ratio"]["n"] == 1
    # The same perplexity as the verb's own, on the model as it was saved.
    verb = run_evaluation("tiny-llama", tmp_path / "verb.json", perplexity=[tmp_path / "held_out.txt"], max_length=64)
    found = verb["results"][f"perplexity:{tmp_path / 'held_out.txt'}"]
    assert summary["original"]["perplexity"]["held_out.txt"] == found
    for name in (
        "comparison.csv",
        "comparison.tex",
        "report.html",
        "plots/perplexity_held_out.png",
        "plots/layers_0.png",
    ):
        assert (tmp_path / "out" / name).stat().st_size > 200
    left = {path.name for path in (tmp_path / "out" / "cells").glob("*/*")}
    assert "model" not in left and "done.json" in left
    # Once more, with the folders gone: nothing is pruned.
    (tmp_path / "out" / "cells").rename(tmp_path / "gone")
    assert compare(path, console=quiet())["rows"] == summary["rows"]
    assert len(in_this_process) == 2


def write_shrinks(tmp_path: Path, **changes) -> Path:
    train = {"max_length": 32, "per_device_train_batch_size": 2, "eval_max_blocks": 2, "logging_steps": 1}
    shrink = {"max_steps": 3, "prune": {"samples": 4, "sample_length": 32, "iterations": 1}, "train": train}
    eval_data = str(write_texts(tmp_path / "eval.jsonl", 2, first=50))
    variants = {"at once": {"interleaves": 1}, "in turn": {"interleaves": 2}}
    given = {"variants": variants, "control": "at once", **changes}
    return write_comparison(tmp_path, prune=None, shrink={**shrink, "eval_data": eval_data}, **given)


def test_a_shrink_is_known_by_its_settings(tmp_path):
    path = write_shrinks(tmp_path)
    keys = [cell.key for cell in opened(path)[1].wanted()]
    assert len(set(keys)) == 3
    assert [cell.key for cell in opened(path, f"output_dir={tmp_path / 'other'}")[1].wanted()] == keys
    elsewhere = (f"shrink.train.cache_dir={tmp_path / 'cache'}", "shrink.keep=all", "shrink.train.save_steps=7")
    assert [cell.key for cell in opened(path, *elsewhere)[1].wanted()] == keys
    longer = [cell.key for cell in opened(path, "shrink.max_steps=4")[1].wanted()]
    assert longer[0] == keys[0] and not set(longer[1:]) & set(keys)
    jobs = [cell.job for cell in opened(path, "seeds=[5]")[1].wanted() if cell.job]
    assert {job.task.run.seed for job in jobs} == {job.task.prune.seed for job in jobs} == {5}
    assert [job.task.settings.interleaves for job in jobs] == [1, 2]
    # Settings of APEX matter where it is the recovery only.
    assert [cell.key for cell in opened(path, "shrink.train.apex.k_heads=0.3")[1].wanted()] == keys
    apex = [opened(path, "shrink.recovery=apex", f"shrink.train.apex.k_heads={k}")[1].wanted() for k in (0.2, 0.3)]
    assert len({cell.key for cells in apex for cell in cells} - set(keys)) == 4


@pytest.mark.slow
def test_shrinking_is_compared_too(in_this_process, tmp_path):
    path = write_shrinks(tmp_path)
    summary = compare(path, console=quiet())
    once, turn = summary["rows"]
    assert once["parameters"]["mean"] <= once["target_parameters"]["mean"] == turn["target_parameters"]["mean"]
    assert once["tokens"]["mean"] == turn["tokens"]["mean"] > 0
    assert turn["perplexity"]["held_out.txt"]["ratio"] and once["method"] == "shrink, adapt"
    assert not list((tmp_path / "out" / "cells").glob("*/shrink"))
    assert compare(path, console=quiet())["rows"] == summary["rows"] and len(in_this_process) == 2


def test_a_failed_cell_does_not_stop_the_others(in_this_process, tmp_path, monkeypatch):
    do = runner._work

    def fail(given, *rest):
        if read_json(given)["prune"]["method"] == "adapt":
            raise RunFailed("importance is NaN")
        do(given, *rest)

    monkeypatch.setattr(runner, "_work", fail)
    path = write_comparison(tmp_path)
    with pytest.raises(UserError, match=r"1 of the comparison's runs failed: adapt at 40%, seed 0: importance is NaN"):
        compare(path, console=quiet())
    summary = read_json(tmp_path / "out" / "comparison.json")
    adapt, uniform = summary["rows"]
    assert adapt["parameters"] is None and uniform["parameters"] and summary["failed"]


def test_what_cannot_be_pruned_is_said_before_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "calibration_from", None)
    settings = PruneSettings(sparsity=0.4, sample_length=4096)
    given = {**PruneJob(settings, "parameters").given(), "model": "tiny-llama", "dtype": "float32", "data": []}
    with pytest.raises(UserError, match="sample_length 4096 is above the model's context of 2048 tokens"):
        work.work(given, tmp_path)


def test_what_is_pruned_is_not_pruned_again(in_this_process, tmp_path, monkeypatch):
    """The time is up between pruning and measuring: the next call measures what lies there."""
    path = write_comparison(tmp_path, variants={"a": {}})
    evaluate, calls = runner.evaluate, []

    def late(*given):
        calls.append(given)
        if len(calls) == 2:
            raise OutOfTime
        return evaluate(*given)

    monkeypatch.setattr(runner, "evaluate", late)
    summary = compare(path, minutes=5, console=quiet())
    assert summary["open"] == 1 and len(in_this_process) == 1
    assert compare(path, console=quiet())["open"] == 0
    assert len(in_this_process) == 1


def test_data_that_changed(in_this_process, tmp_path, monkeypatch):
    path = write_comparison(tmp_path)
    do = runner._work

    def change(given, *rest):
        do(given, *rest)
        write_texts(tmp_path / "text.jsonl", 6)

    monkeypatch.setattr(runner, "_work", change)
    with pytest.raises(UserError, match="have changed since the comparison began"):
        compare(path, console=quiet())


def test_missing_text_and_a_folder_in_use(tmp_path):
    path = write_comparison(tmp_path, perplexity="none.txt")
    with pytest.raises(UserError, match=r"perplexity: none\.txt: no such file"):
        compare(path, console=quiet())
    path = write_comparison(tmp_path)
    (tmp_path / "out").mkdir()
    with alone(tmp_path / "out"), pytest.raises(UserError, match="another comparison is running there"):
        compare(path, console=quiet())


def test_plan(tmp_path):
    console = quiet()
    summary = compare(write_comparison(tmp_path, seeds=[0, 1]), dry_run=True, console=console)
    assert summary["open"] == 5 and "adapt at 40%, seed 1" in console.file.getvalue()
    assert "too few for an interval" in console.file.getvalue()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_in_processes(tmp_path):
    """The command as a person gives it, each cell in processes of its own; and an error of one is told."""
    variants = {"a": {"method": "random"}, "b": {"method": "random", "iterations": 1, "samples": 999}}
    path = write_comparison(tmp_path, variants=variants)
    with pytest.raises(UserError, match=r"1 of the comparison's runs failed: b at 40%.*an iteration needs 999"):
        compare(path, console=quiet())
    assert read_json(tmp_path / "out" / "comparison.json")["rows"][0]["parameters"]


def test_docs_have_every_key():
    text = (ROOT / "docs" / "compare.md").read_text()
    for name, (_, words_of) in config_docs.field_docs(PruneCompareConfig).items():
        assert f"| `{name}` | " in text and words_of in text, name


def test_the_example(tmp_path):
    comparison = load_prune_comparison(ROOT / "examples" / "compare_prune_tiny.yaml")
    assert comparison.control == "uniform" and dataclasses.asdict(comparison.settings)["model"] == "tiny-llama"
