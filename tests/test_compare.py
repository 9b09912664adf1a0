"""A comparison from its runs to its tables: order, reuse, choice, and what is written."""

import csv
import dataclasses
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from test_reporting_report import References
from tiny_comparisons import ENVIRONMENT, by_name, finish, loss_of, made_up, opened, write_comparison

from graftlm.comparing import plots
from graftlm.comparing.cells import planned_stage_starts
from graftlm.comparing.report import headline, write_outputs
from graftlm.comparing.results import Results
from graftlm.comparing.summary import summarise
from graftlm.comparing.tables import csv_text, latex_of, print_tables, tables
from graftlm.comparing.tasks import Tasks
from graftlm.content import file_sha256
from graftlm.errors import UserError
from graftlm.reporting.style import CONTROL
from graftlm.training.run import train_one


@pytest.fixture
def finished(tmp_path):
    """(comparison, cells, summary) of made-up runs: control and apex on three seeds, plain training at 3 lengths."""
    comparison, cells = opened(write_comparison(tmp_path))
    assert finish(cells, loss_of) == 3 * 4
    return comparison, cells, summarise(comparison, cells, {})


# --- which runs, in which order


def test_order(tmp_path):
    _, cells = opened(write_comparison(tmp_path))
    order = [(cell.arm, cell.seed, cell.multiple) for cell in cells.wanted()]
    pairs = [(arm, seed, 1.0) for seed in (0, 1, 2) for arm in ("control", "apex")]
    assert order == pairs + [("control", seed, multiple) for seed in (0, 1, 2) for multiple in (0.5, 2.0)]
    assert [cell.config.max_steps for cell in cells.wanted()][-2:] == [4, 16]
    assert {cell.config.seed for cell in cells.wanted()} == {0, 1, 2}


def test_learning_rates_are_chosen_on_selection_data_alone(tmp_path):
    _, cells = opened(write_comparison(tmp_path, learning_rates=[1e-3, 2e-3, 4e-3], selection_seeds=[0]))
    first = [(cell.arm, cell.seed, cell.learning_rate) for cell in cells.wanted()]
    assert first == [(arm, 0, rate) for arm in ("control", "apex") for rate in (1e-3, 2e-3, 4e-3)]
    for cell in cells.open():  # what is reported would choose 4e-3
        cells.results.put(cell.key, made_up(cell, -cell.learning_rate, selection_loss=abs(cell.learning_rate - 2e-3)))
    arm = cells.comparison.arm("apex")
    assert cells.chosen_rate(arm) == 2e-3
    assert {cell.learning_rate for cell in cells.open()} == {2e-3}
    assert len(cells.open()) == 2 * 2 + 3 * 2


def test_a_learning_rate_that_failed_is_not_in_the_running(tmp_path):
    failed = set()
    _, cells = opened(write_comparison(tmp_path, learning_rates=[1e-3, 9.0], seeds=[0]), failed=failed.__contains__)
    for cell in cells.open():
        if cell.learning_rate == 9:
            failed.add(cell.key)
        else:
            cells.results.put(cell.key, made_up(cell, 3.0))
    assert cells.chosen_rate(cells.comparison.arm("apex")) == 1e-3


def test_a_control_waits_for_stages_that_only_the_run_tells(tmp_path):
    staged = {"method": "apex", "apex.rewarmup_ratio": 0.1, "apex.stage_by": "tokens", "apex.stage_length": 900}
    _, cells = opened(write_comparison(tmp_path, variants={"apex": staged}, plain_multiples=[1, 2], seeds=[0]))
    (first,) = cells.open()
    assert first.arm == "apex"
    cells.results.put(first.key, made_up(first, 3.0, stage_starts=[0, 5]))
    assert [(cell.arm, cell.multiple, cell.config.stage_starts) for cell in cells.open()] == [
        ("control", 1.0, (0, 5)),
        ("control", 2.0, (0, 10)),
    ]


def test_a_plan_counts_runs_that_cannot_be_named_yet(tmp_path):
    """As many as are in the end run."""
    by_tokens = {"method": "apex", "apex.rewarmup_ratio": 0.1, "apex.stage_by": "tokens", "apex.stage_length": 900}
    chosen = {"learning_rates": [1e-3, 2e-3], "selection_seeds": [0]}
    for number, changes in enumerate([chosen, {"variants": {"apex": by_tokens}}, {}]):
        _, cells = opened(write_comparison(tmp_path / str(number), **changes))
        named, later = len(cells.open()), cells.later()
        assert bool(later) == bool(changes)
        assert finish(cells, loss_of, stage_starts=[0, 4]) == named + later
        assert not cells.later()


def test_planned_stage_starts_are_those_of_a_run(tmp_path):
    variants = {"apex": {"method": "apex", "apex.stages": 3, "apex.rewarmup_ratio": 0.1}}
    _, cells = opened(write_comparison(tmp_path, variants=variants, base={"max_steps": 10}))
    control, apex = list(cells.wanted())[:2]
    run = dataclasses.replace(apex.config, output_dir=str(tmp_path / "run"))
    starts = tuple(stage["step"] for stage in train_one(run)["stages"])
    assert starts == planned_stage_starts(apex.config) == control.config.stage_starts == (0, 3, 7)


# --- finished runs


def test_finished_runs_are_found_by_another_checkout(finished, tmp_path):
    comparison, cells, _ = finished
    assert cells.open() == []
    moved = tmp_path / "moved"
    _, again = opened(write_comparison(moved, results=str(comparison.results_path)))
    assert again.open() == []
    _, changed = opened(write_comparison(moved, results=str(comparison.results_path), base={"weight_decay": 0.1}))
    assert len(changed.open()) == 12
    _, longer = opened(write_comparison(moved, results=str(comparison.results_path), seeds=[0, 1, 2, 3]))
    assert {cell.seed for cell in longer.open()} == {3}


def test_a_changed_default_runs_again(finished):
    comparison, cells, _ = finished
    content = json.loads(comparison.results_path.read_text())
    key = next(iter(content["cells"]))
    content["cells"][key]["settings"]["adam_beta2"] = 0.5
    comparison.results_path.write_text(json.dumps(content))
    cells.results = Results(comparison.results_path)
    assert [cell.key for cell in cells.open()] == [key]


def test_results_of_two_sessions_meet(finished):
    comparison, cells, _ = finished
    other = Results(comparison.results_path)
    other.put("theirs", {"settings": {}})
    cells.results.put("ours", {"settings": {}})
    assert {"theirs", "ours"} <= json.loads(comparison.results_path.read_text())["cells"].keys()


def test_results_of_many_sessions_at_once(tmp_path):
    """Each reads the file, adds its own and writes it: none may write what another has not seen."""

    def session(name: int) -> None:
        results = Results(tmp_path / "shared" / "results.json")
        for number in range(8):
            results.put(f"{name}-{number}", {"settings": {}})

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(session, range(6)))
    found = json.loads((tmp_path / "shared" / "results.json").read_text())["cells"]
    assert found.keys() == {f"{name}-{number}" for name in range(6) for number in range(8)}


@pytest.mark.parametrize(
    ("content", "said"),
    [("[]", "holds no results"), ('{"cells": {}, "format": 0}', "is of format 0"), ("{", "not valid JSON")],
)
def test_results_that_are_not_ours(tmp_path, content, said):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UserError, match=said):
        Results(tmp_path / "r.json")


def test_more_tasks_run_again(finished, tmp_path):
    comparison, _, _ = finished
    results = str(comparison.results_path)
    _, asked = opened(write_comparison(tmp_path, results=results, tasks=["arc_easy"], task_limit=5))
    assert len(asked.open()) == 6  # plain training at other lengths is not evaluated on tasks
    told = [summarise(one.comparison, one, {}) for one in (finished[1], asked)]
    for summary in told:  # losses that are known already stay
        del summary["open"], summary["date"], summary["tasks"]
        assert all(not arm["tasks"] for arm in summary["arms"]) and by_name(summary, "apex")["needed"]
    assert told[0] == told[1]
    scores = {"asked": ["arc_easy"], "limit": 5, "results": {"arc_easy": {"acc": 0.5, "acc_stderr": 0.1, "n": 5}}}
    finish(asked, loss_of, tasks=scores)
    summary = summarise(asked.comparison, asked, {})
    assert by_name(summary, "apex")["tasks"]["arc_easy"]["metric"] == "acc"
    assert by_name(summary, "apex")["tasks"]["arc_easy"]["difference"]["mean"] == 0
    assert "arc_easy (acc)" in latex_of(tables(summary)).replace("\\", "")


def test_scores_of_other_questions_are_not_used(tmp_path):
    """The files of the data folder count, as far as they are there; not what a list of tasks is called."""
    questions = tmp_path / "D" / "arc_easy" / "test.jsonl"
    questions.parent.mkdir(parents=True)
    questions.write_text("one")
    read = {"arc_easy": {"arc_easy/test.jsonl": file_sha256(questions)}}
    scores = {"asked": ["arc_easy"], "limit": None, "results": {"arc_easy": {"acc": 0.5, "shots": 0}}, "data": read}
    given = {"tasks": ["arc_easy"], "task_data_dir": str(tmp_path / "D"), "plain_multiples": [1]}
    _, cells = opened(write_comparison(tmp_path, **given))
    assert finish(cells, loss_of, tasks=scores) == 6
    record = next(cells.results.records())["tasks"]
    questions.write_text("two")
    assert len(opened(write_comparison(tmp_path, **given))[1].open()) == 6
    elsewhere = {**given, "task_data_dir": str(tmp_path / "none")}
    for same in (elsewhere, {**given, "task_data_dir": None}, {**elsewhere, "tasks": ["arc_easy:0"]}):
        assert not opened(write_comparison(tmp_path, **same))[1].open()
    assert opened(write_comparison(tmp_path, **{**elsewhere, "tasks": ["arc_easy:5"]}))[1].open()
    assert opened(write_comparison(tmp_path, **{**elsewhere, "task_dtype": "bfloat16"}))[1].open()
    of_the_hub = {**record, "data": {"arc_easy": {"hub": "allenai/ai2_arc", "name": "ARC-Easy"}}}
    asked = Tasks(("arc_easy",), data_dir=str(tmp_path / "D"))
    assert not asked.answered(of_the_hub) and Tasks(("arc_easy",), data_dir=str(tmp_path)).answered(of_the_hub)
    assert Tasks(("arc_easy",)).answered({key: value for key, value in of_the_hub.items() if key != "data"})
    assert asked.answered({**record, "data": {"piqa": {"arc_easy/test.jsonl": "0"}}, "results": {"piqa": {}}})


def test_lists_of_tasks_are_what_they_hold():
    kept = {"asked": ["paper-it"], "limit": 9, "results": {}}
    assert Tasks(("gsm8k_cot:8", "mmlu:5"), 9).answered(kept) and not Tasks(("gsm8k_cot:4",), 9).answered(kept)
    assert not Tasks(("humaneval",), 9).answered(kept)  # of one program a problem, not of twenty
    assert Tasks(("paper-it",), 9).answered(kept) and not Tasks(("paper-it",)).answered(kept)


def test_what_a_run_scored_before_is_kept(tmp_path):
    """Two comparisons that share a run and differ in tasks do not undo each other."""

    def scored(limit, *names):
        results = {name: {"acc": 0.1 * limit} for name in names}
        return {"settings": {"seed": 0}, "tasks": {"asked": list(names), "limit": limit, "results": results}}

    def kept(first, second):
        results = Results(tmp_path / "r.json")
        results.put("run", first)
        results.put("run", second)
        (tmp_path / "r.json").unlink()
        return next(results.records())["tasks"]

    both = kept(scored(5, "a", "b"), scored(5, "c"))
    assert both.pop("data") == {}
    assert both == {"asked": ["a", "b", "c"], "limit": 5, "results": {name: {"acc": 0.5} for name in "abc"}}
    assert kept(scored(5, "a", "b"), scored(5, "b", "c")) == scored(5, "b", "c")["tasks"]  # b may have other shots
    assert kept(scored(5, "a"), {"settings": {"seed": 0}, "tasks": {}}) == {**scored(5, "a")["tasks"], "data": {}}
    assert kept(scored(5, "a"), scored(9, "b")) == scored(9, "b")["tasks"]  # not of as many questions
    half = scored(5, "b")
    half["tasks"]["dtype"] = "bfloat16"
    assert kept(scored(5, "a"), half) == half["tasks"]
    half["tasks"]["dtype"] = "float32"  # as those that do not tell
    assert kept(scored(5, "a"), half)["results"].keys() == {"a", "b"}
    assert kept(scored(5, "a") | {"settings": {"seed": 1}}, scored(5, "b")) == scored(5, "b")["tasks"]


# --- what is said


def test_numbers(finished):
    _, cells, summary = finished
    assert [arm["name"] for arm in summary["arms"]] == ["control", "apex"]  # the control first
    runs = {(cell.arm, cell.seed): loss_of(cell) for cell in cells.wanted() if cell.multiple == 1}
    own, other = ([runs[name, seed] for seed in range(3)] for name in ("apex", "control"))
    gap = by_name(summary, "apex")["difference"]
    oracle = stats.ttest_rel(own, other)
    assert gap["mean"] == pytest.approx(np.mean(own) - np.mean(other))
    assert gap["t_interval"] == pytest.approx(oracle.confidence_interval(0.95))
    assert gap["shown"] == "lower"
    assert by_name(summary, "control")["loss"]["mean"] == pytest.approx(np.mean(other))
    needed = by_name(summary, "apex")["needed"]
    assert needed["multiple"] == pytest.approx((0.2 / (0.2 * 1.4**-0.5 + 0.001)) ** 2, rel=0.02)
    assert needed["interval"][0] < 1.4 * 0.98 < needed["interval"][1]
    assert by_name(summary, "apex")["time_ratio"]["median"] == 1
    assert "difference" not in by_name(summary, "control")


def test_two_seeds_have_no_interval(tmp_path):
    comparison, cells = opened(write_comparison(tmp_path, seeds=[0, 1]))
    finish(cells, loss_of)
    summary = summarise(comparison, cells, {})
    gap = by_name(summary, "apex")["difference"]
    assert gap["t_interval"] is gap["bootstrap_interval"] is None
    assert by_name(summary, "apex")["needed"]["interval"] is None
    assert any("too few for an interval" in note for note in summary["notes"])
    assert "too few for an interval" in headline(summary)
    (row,) = [row for row in tables(summary)[0].rows if row[0] == "apex"]
    assert row[-1] == "too few seeds" and not any("interval" in name for name in tables(summary)[0].header)


def test_copies_of_one_run_have_no_interval(tmp_path):
    """Plain training is the same at every seed (streamed data): three of it are no sample."""
    comparison, cells = opened(write_comparison(tmp_path, base={"streaming": True}, tasks=["arc_easy"]))
    assert any("seeds are copies of runs, and no interval is given" in note for note in comparison.notes)

    def tasks(cell):
        scores = {"asked": ["arc_easy"], "limit": None, "results": {"arc_easy": {"acc": 0.1 * cell.seed}}, "data": {}}
        return scores if cells.tasks(cell) else {}

    while todo := cells.open():
        loss = loss_of(dataclasses.replace(todo[0], seed=0)) + 1e-5 * todo[0].seed * (todo[0].arm == "apex")
        cells.results.put(todo[0].key, made_up(todo[0], loss, tasks=tasks(todo[0])))
    summary = summarise(comparison, cells, {})
    apex = by_name(summary, "apex")
    assert apex["difference"]["n"] == 3 and apex["difference"]["mean"] < 0
    gaps = (apex["difference"], apex["tasks"]["arc_easy"]["difference"])
    assert all(gap["t_interval"] is gap["bootstrap_interval"] is None for gap in gaps)
    assert apex["needed"]["interval"] is None
    assert any("copies of one run" in note for note in summary["notes"]) and "copies of one run" in headline(summary)
    (row,) = [row for row in tables(summary)[0].rows if row[0] == "apex"]
    assert row[-1] == "no interval"


def test_streams_of_several_sources_have_no_interval(tmp_path):
    """Their seeds are two or three orders, so that controls differ, and are no sample all the same."""
    path = write_comparison(tmp_path, base={"streaming": True})
    data = [{"path": str(tmp_path / name), "weight": 1} for name in ("text.jsonl", "held_out.jsonl")]
    comparison, cells = opened(path, f"base.data={json.dumps(data)}")
    finish(cells, loss_of)
    apex = by_name(summarise(comparison, cells, {}), "apex")
    assert apex["difference"]["n"] == 3 and apex["difference"]["t_interval"] is None
    assert apex["needed"]["interval"] is None


def test_seeds_that_differ_have_one_and_no_note(finished):
    comparison, _, summary = finished
    assert not any("copies of one run" in note for note in summary["notes"]) and not comparison.notes


def test_multiples_of_as_many_tokens_are_one(tmp_path):
    """By epochs, parts of a short one may come to the same number of steps, which only the runs tell."""

    def summary(folder, tokens):
        base = {"max_steps": -1, "num_train_epochs": 1}
        comparison, cells = opened(write_comparison(tmp_path / folder, base=base, plain_multiples=[0.5, 0.75, 1, 2]))
        while todo := cells.open():
            record = made_up(todo[0], loss_of(todo[0]), tokens=tokens(todo[0].multiple), steps=1)
            cells.results.put(todo[0].key, record)
        return summarise(comparison, cells, {}), comparison.folder

    found, folder = summary("a", lambda multiple: 1000 if multiple < 2 else 2000)
    assert by_name(found, "apex")["needed"]["n"] == 3
    assert [len(row) for row in found["plain"]["control"]["tokens"].values()] == [2] * 3
    assert any("come to as many tokens" in note for note in found["notes"])
    write_outputs(folder, found)
    none, folder = summary("b", lambda multiple: 1000)
    assert by_name(none, "apex")["needed"] is None and not none["plain"]
    write_outputs(folder, none)


def test_arms_of_unequal_seeds(finished, monkeypatch):
    """The difference is that of pairs, not of the means that stand beside it; and it says so."""
    comparison, cells, whole = finished
    wanted = {cell.key: cell for cell in cells.wanted()}
    gone = next(cell for cell in wanted.values() if cell.arm == "apex" and cell.seed == 1)
    trained = cells.trained
    monkeypatch.setattr(cells, "trained", lambda cell: None if cell and cell.key == gone.key else trained(cell))
    summary = summarise(comparison, cells, {})
    gap = by_name(summary, "apex")["difference"]
    pairs = by_name(whole, "apex")["difference"]["by_seed"]
    assert gap["n"] == 2 and gap["mean"] == pytest.approx((pairs["0"] + pairs["2"]) / 2)
    assert gap["mean"] != by_name(summary, "apex")["loss"]["mean"] - by_name(summary, "control")["loss"]["mean"]
    assert gap["t_interval"] is None and gap["shown"] == "too few seeds"
    assert any("apex has 2 finished seeds and control 3" in note for note in summary["notes"])
    assert not any("finished seeds" in note for note in whole["notes"])


def test_an_arm_that_had_more_learning_rates_than_its_control_says_so(tmp_path, finished):
    variants = {"apex": {"method": "apex", "learning_rates": [1e-3, 2e-3]}}
    comparison, cells = opened(write_comparison(tmp_path, variants=variants))
    finish(cells, loss_of)
    notes = summarise(comparison, cells, {})["notes"]
    assert any("the best of 2, that of control of 1" in note for note in notes)
    assert not any("the best of" in note for note in finished[2]["notes"])


def test_tasks_show_what_an_evaluation_calls_its_main_metric(tmp_path):
    comparison, cells = opened(write_comparison(tmp_path, tasks=["wikitext", "gsm8k"], plain_multiples=[1]))
    results = {
        "wikitext": {"word_perplexity": 9.0, "n": 4, "shots": 0, "version": 2.0, "main_metric": "word_perplexity"},
        "gsm8k": {"exact_match:a": None, "exact_match:b": 0.5, "shots": 5, "main_metric": "exact_match:b"},
    }
    finish(cells, loss_of, tasks={"asked": ["wikitext", "gsm8k"], "limit": None, "results": results})
    summary = summarise(comparison, cells, {})
    shown = by_name(summary, "apex")["tasks"]
    assert [(shown[name]["metric"], shown[name]["mean"]) for name in results] == [
        ("word_perplexity", 9.0),
        ("exact_match:b", 0.5),
    ]
    (row, *_) = csv.DictReader(io.StringIO(csv_text(summary)))
    assert row["gsm8k exact_match:b"] == "0.5" and row["arm"] == "control" and row["control"] == ""


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tokens", 999, "tokens 999 and 4,000"),
        ("steps", 3, "steps 3 and 8"),
        ("data", [{"path": "b", "content": "other"}], "data is not the same"),
        ("eval_data", [], "eval_data is not the same"),
        ("seed", 7, "seed is not the same"),
    ],
)
def test_runs_that_cannot_be_compared(finished, key, value, said):
    comparison, cells, _ = finished
    cell = next(cell for cell in cells.wanted() if cell.arm == "apex")
    record = made_up(cell, 3.0)
    where = record if key in ("tokens", "steps") else record["settings"]
    where[key] = value
    cells.results._cells[cell.key] = record
    cells.results.get = lambda key, settings: cells.results._cells.get(key)  # as if it had been taken for the same run
    with pytest.raises(UserError, match=f"apex and control, seed 0, cannot be compared: {re.escape(said)}"):
        summarise(comparison, cells, {})


def test_other_hardware_gives_no_time_ratio(finished):
    comparison, cells, _ = finished
    other = {**ENVIRONMENT, "gpus": [{"name": "G"}], "git_commit": None}
    for cell in list(cells.wanted()):
        if cell.arm == "apex":
            cells.results.put(cell.key, made_up(cell, 3.0, environment=other))
    summary = summarise(comparison, cells, {})
    assert by_name(summary, "apex")["time_ratio"] is None
    assert any("other hardware than the control's; no time ratio" in note for note in summary["notes"])
    assert len(summary["hardware"]) == 2 and summary["commits"] == ["abc"]


def test_time_ratios_are_of_the_same_hardware(finished):
    comparison, cells, _ = finished
    one = next(cell for cell in cells.wanted() if cell.arm == "apex")
    cells.results.put(one.key, made_up(one, 3.0, environment={**ENVIRONMENT, "gpus": [{"name": "G"}]}))
    summary = summarise(comparison, cells, {})
    assert len(by_name(summary, "apex")["time_ratio"]["by_seed"]) == 2
    assert any("apex: 1 of its runs had other" in note and "over the other 2" in note for note in summary["notes"])


def test_plots_show_the_arms_their_losses_and_differences(finished, tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: made.setdefault(path.stem, figure) and path)
    summary = finished[2]
    for arm in summary["arms"]:  # a point on the way
        curve = arm["curve"]
        arm["curve"] = {key: [values[0], sum(values) / 2, values[1]] for key, values in curve.items()}
    plots.draw(summary, tmp_path)
    lines = {line.get_label(): line for line in made["loss_tokens"].axes[0].lines}
    assert list(lines) == ["control", "apex"] and lines["control"].get_color() == CONTROL
    for name, line in lines.items():
        curve = by_name(summary, name)["curve"]
        assert line.get_xdata().tolist() == curve["tokens"] and line.get_ydata().tolist() == curve["loss"]
    # Evaluations of one arm alone, as those of stages are, would bend its line where the others' have none.
    arm = by_name(summary, "apex")
    curve = arm["curve"]
    arm["curve"] = {key: [values[0], values[0] + 1.5, *values[1:]] for key, values in curve.items()}
    redrawn = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: redrawn.setdefault(path.stem, figure) and path)
    plots.draw(summary, tmp_path)
    for x in ("tokens", "seconds"):
        line = {line.get_label(): line for line in redrawn[f"loss_{x}"].axes[0].lines}["apex"]
        assert line.get_xdata().tolist() == curve[x] and line.get_ydata().tolist() == curve["loss"]
    arm["curve"] = curve
    assert made["loss_seconds"].axes[0].lines[0].get_xdata().tolist() == by_name(summary, "control")["curve"]["seconds"]
    gap = by_name(summary, "apex")["difference"]
    drawn = [line.get_xdata() for line in made["differences"].axes[0].lines]
    assert [list(x) for x in drawn[1:]] == [list(gap["t_interval"]), list(gap["by_seed"].values()), [gap["mean"]]]
    curve = summary["plain"]["control"]
    needed = {line.get_label(): line for line in made["tokens_needed_0"].axes[0].lines}
    assert list(needed["control"].get_xdata()) == curve["multiples"]
    assert list(needed["control"].get_ydata()) == pytest.approx(np.mean(list(curve["losses"].values()), axis=0))


def test_start_and_end_alone_are_no_curve(finished, tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: made.setdefault(path.stem, figure) and path)
    summary = finished[2]
    plots.draw(summary, tmp_path)
    assert "loss_tokens" not in made
    (axes,) = made["loss_seconds"].axes
    assert made["loss_seconds"].get_suptitle().startswith("Held-out loss at the end against the time it took")
    for line, arm in zip(axes.lines, summary["arms"], strict=True):
        end = (arm["curve"]["seconds"][-1], arm["curve"]["loss"][-1])
        assert (line.get_linestyle(), *line.get_xdata(), *line.get_ydata()) == ("None", *end)


def test_tables_are_there_where_a_plot_cannot_be_drawn(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("graftlm.comparing.report.draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_outputs(tmp_path / "drawn", finished[2])
    names = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert names == {"comparison.json", "comparison.csv", "comparison.tex"}


def test_the_chosen_rate_at_the_end_of_the_grid_is_said(tmp_path):
    comparison, cells = opened(write_comparison(tmp_path, learning_rates=[1e-3, 2e-3], variants={"a": {}}))
    finish(cells, lambda cell: loss_of(cell) - 0.1 * cell.learning_rate)
    summary = summarise(comparison, cells, {})
    assert any("at the end of those tried" in note for note in summary["notes"])
    assert by_name(summary, "a")["learning_rate"] == 2e-3
    assert "Choice of the learning rate" in [table.title for table in tables(summary)]


def test_the_difference_at_the_same_rate(tmp_path):
    comparison, cells = opened(write_comparison(tmp_path, learning_rates=[1e-3, 2e-3]))
    finish(cells, lambda cell: loss_of(cell) + (0.1 if (cell.arm == "apex") == (cell.learning_rate == 2e-3) else 0))
    arm = by_name(summarise(comparison, cells, {}), "apex")
    assert arm["learning_rate"] == 1e-3  # and the control's is 2e-3; at 1e-3 it is worse by 0.1
    assert arm["difference_at_same_rate"]["mean"] == pytest.approx(arm["difference"]["mean"] - 0.1)


def test_files(finished, tmp_path):
    comparison, _, summary = finished
    written = write_outputs(comparison.folder, summary)
    assert all(path.exists() for path in written)
    assert json.loads((comparison.folder / "comparison.json").read_text())["arms"] == json.loads(
        json.dumps(summary["arms"])
    )
    rows = list(csv.DictReader(io.StringIO(csv_text(summary))))
    assert len(rows) == 6
    assert float(rows[3]["loss"]) - float(rows[0]["loss"]) == pytest.approx(float(rows[3]["minus_control"]))
    latex = latex_of(tables(summary))
    assert latex.count("\\toprule") == latex.count("\\bottomrule") == len(tables(summary))
    for line in latex.splitlines():
        assert not re.search(r"(?<!\\)[_%#](?!.*booktabs)", line) or line.startswith("%")
    found = References()
    page = (comparison.folder / "report.html").read_text()
    found.feed(page)
    assert all(address.startswith("data:image/png;base64,") for address in found.addresses)
    assert len(found.addresses) == 3
    assert "<style>" in page and not found.tags & {"script", "link"}
    for row in tables(summary)[0].rows:
        assert row[3] in page
    console = Console(file=io.StringIO(), width=80)  # what there is for a log file; no number may be cut
    print_tables(summary, console)
    assert all(cell in console.file.getvalue() for table in tables(summary) for row in table.rows for cell in row)
    assert by_name(summary, "apex")["needed"]["text"] in console.file.getvalue()


def test_columns_that_say_nothing_are_left_out(finished, tmp_path):
    summary = finished[2]
    losses = tables(summary)[0]
    assert "at the same learning rate" not in losses.header and "same learning rate" not in losses.note
    assert {"95% interval (t)", "tokens plain training needs"} < set(losses.header)
    assert all(len(row) == len(losses.header) for row in losses.rows)
    assert "at the same learning rate" not in latex_of([losses])
    assert "minus_control" in csv_text(summary).splitlines()[0]
    by_name(summary, "apex")["difference_at_same_rate"] = {"mean": 0.5}
    losses = tables(summary)[0]
    assert (
        "at the same learning rate" in losses.header and "At the same learning rate: minus the control" in losses.note
    )
    comparison, cells = opened(write_comparison(tmp_path / "alone", seeds=[0], plain_multiples=[1]))
    finish(cells, loss_of)
    header = tables(summarise(comparison, cells, {}))[0].header
    assert header == ("arm", "learning rate", "seeds", "held-out loss", "minus control", "shown")


def test_a_narrow_terminal_shows_what_tells_most(finished):
    def lines(width, terminal=True):
        console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
        print_tables(finished[2], console)
        return console.file.getvalue()

    gap = by_name(finished[2], "apex")["difference"]
    short = lines(100)
    assert f"{gap['mean']:+.5f}".replace("-", "−") in short and "lower" in short and "bootstrap)" not in short
    assert "report.html" in short and max(map(len, short.splitlines())) <= 100
    for whole in (lines(200), lines(80, terminal=False)):
        assert "bootstrap)" in whole and "report.html" not in whole


def test_the_headline_counts_many_arms(finished):
    summary = finished[2]
    assert headline(summary).endswith(": lower loss") and headline(summary).startswith("apex minus control: −")
    apex = by_name(summary, "apex")
    for number, shown in enumerate(["higher", *["no difference shown"] * 3]):
        summary["arms"].append({**apex, "name": str(number), "difference": {**apex["difference"], "shown": shown}})
    assert headline(summary) == "5 arms against their control: 1 lower, 1 higher, 3 no difference shown"
    summary["arms"][-1]["matched"] = "another"
    summary["arms"][-1]["difference"]["shown"] = "too few seeds"
    counted = "1 lower, 1 higher, 2 no difference shown, 1 too few seeds"
    assert headline(summary) == f"5 arms against their controls: {counted}"


def test_nothing_finished_is_no_error(tmp_path):
    comparison, cells = opened(write_comparison(tmp_path))
    summary = summarise(comparison, cells, {})
    assert summary["open"] == 12
    write_outputs(tmp_path / "out", summary)
    assert "no arm and its control have both been run" in (tmp_path / "out/report.html").read_text()
