"""What a comparison of ways of pruning shows: paired ratios, tables, notes."""

import csv
import io
import json
import math
import statistics
from pathlib import Path

import pytest
import scipy.stats
from tiny_comparisons import ENVIRONMENT
from tiny_prune_comparisons import opened, write_comparison

from graftlm.comparing.pruning.cells import PruneCells
from graftlm.comparing.pruning.plots import draw
from graftlm.comparing.pruning.report import headline
from graftlm.comparing.pruning.summary import paired_ratios, summarise
from graftlm.comparing.pruning.tables import csv_text, tables
from graftlm.comparing.results import Results
from graftlm.comparing.summary import tasks_average
from graftlm.comparing.tables import latex_of
from graftlm.files import write_json


def made_up(cell, word: float | None, parameters: int = 150_000):
    shapes = [{"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}] * 4
    before = [{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192}] * 4
    found = {"word_perplexity": word, "token_perplexity": 9.0, "loss": math.log(9.0), "tokens": 50, "words": 20}
    record = {
        **{"settings": json.loads(json.dumps(cell.settings)), "method": cell.method, "environment": ENVIRONMENT},
        **{"perplexity": {"held_out.txt": {**found, "max_length": 64}}, "wall_seconds": 60.0},
        "tasks": {"asked": [], "limit": None, "results": {"piqa": {"acc": 0.5, "main_metric": "acc"}}},
    }
    if cell.job is None:
        return record
    return record | {
        **{"target_parameters": 150_010, "parameters": parameters, "original_parameters": 200_000, "notes": []},
        **{"shapes": shapes, "original_shapes": before, "seconds": 2.0, "peak_memory_bytes": 2**30},
    }


def finished(path: Path, word) -> dict:
    """The summary of a comparison whose cells have word(cell) as perplexity."""
    comparison, cells = opened(path)
    for cell in cells.open():
        cells.results.put(cell.key, made_up(cell, word(cell)))
    return summarise(comparison, PruneCells(comparison, Results(comparison.results_path)), {})


def test_differences_are_paired_by_trial(tmp_path):
    path = write_comparison(tmp_path, seeds=[0, 1, 2], sparsities=[0.2, 0.4])

    def word(cell):
        if cell.job is None:
            return 20.0
        return 30.0 + 10 * cell.seed - (5 + cell.seed if cell.arm == "adapt" else 0)

    summary = finished(path, word)
    found = summary["rows"][0]["perplexity"]["held_out.txt"]
    ratio, ratios = found["ratio"], [25 / 30, 34 / 40, 43 / 50]
    assert list(ratio["by_seed"].values()) == ratios and found["lower_in"] == 3
    assert ratio["shown"] == "lower" and found["word"]["mean"] == pytest.approx(statistics.geometric_mean([25, 34, 43]))
    assert ratio["mean"] == pytest.approx(statistics.geometric_mean(ratios))
    logs = [math.log(one) for one in ratios]
    half = scipy.stats.t.ppf(0.975, 2) * statistics.stdev(logs) / math.sqrt(3)
    middle = statistics.mean(logs)
    assert ratio["t_interval"] == pytest.approx([math.exp(middle - half), math.exp(middle + half)])
    assert ratio["bootstrap_interval"] == pytest.approx([ratios[0], ratios[2]])
    assert summary["rows"][1]["perplexity"]["held_out.txt"]["ratio"] is None
    assert summary["rows"][0]["gone"]["mean"] == pytest.approx(0.25)
    assert summary["rows"][0]["components_gone"]["channels"]["mean"] == 0.5
    shown = tables(summary)
    assert [table.title for table in shown] == ["Perplexity on held_out.txt", "Sizes and costs", "Tasks"]
    assert shown[0].rows[1][:5] == ("20%", "adapt", "150 k", "3", "33.19 (25.00 to 43.00)")
    assert shown[1].rows[0][3] == "−10" and "3 of 3" in shown[0].rows[1]
    assert "uniform (control)" in latex_of(shown) and "20 words" in shown[0].note
    rows = list(csv.DictReader(io.StringIO(csv_text(summary))))
    assert len(rows) == 12 and float(rows[0]["times_control held_out.txt"]) == 25 / 30
    assert rows[3]["control"] == "yes" and rows[0]["piqa"] == "0.5"


def test_calibration_stands_beside_the_time(tmp_path):
    """By the settings, so that records of before there was a column have it too."""
    sheared = {"method": "sheared", "sheared_steps": 5, "iterations": None}
    variants = {"adapt": {"method": "adapt"}, "random": {"method": "random"}, "sheared": sheared}
    summary = finished(write_comparison(tmp_path, variants=variants), lambda cell: 20.0)
    costs = next(table for table in tables(summary) if table.title == "Sizes and costs")
    column = costs.header.index("calibration tokens")
    assert costs.header[column + 1] == "time"
    assert {row[1]: row[column] for row in costs.rows} == {"adapt": "256", "random": "0", "sheared": "640"}
    rows = list(csv.DictReader(io.StringIO(csv_text(summary))))
    assert [row["calibration_tokens"] for row in rows] == ["256", "0", "640"]


def test_two_trials_have_no_interval(tmp_path):
    summary = finished(write_comparison(tmp_path, seeds=[0, 1]), lambda cell: 30.0 + len(cell.arm))
    ratio = summary["rows"][0]["perplexity"]["held_out.txt"]["ratio"]
    assert ratio["t_interval"] is None and ratio["bootstrap_interval"] is None and ratio["shown"] == "too few seeds"
    assert any("too few for an interval" in note for note in summary["notes"])


def test_ratios_of_broken_models():
    """Perplexities that differ by orders of magnitude between trials: their ratio is still told from 1."""
    own, other = {0: 7.7e4, 1: 8.6e4, 2: 3.1e4}, {0: 2.8e6, 1: 1.1e6, 2: 1.2e6}
    found = paired_ratios(own, other)
    assert found["shown"] == "lower" and found["mean"] < found["t_interval"][1] < 1
    beyond = paired_ratios({0: 1.0, 1: 1e300, 2: 1e-300}, {0: 1.0, 1: 1e-300, 2: 1e300})
    assert beyond["shown"] == "no difference shown" and json.dumps(beyond, allow_nan=False)
    assert paired_ratios({0: 1.0}, {1: 1.0}) is None


def test_what_is_beyond_a_double_is_said(tmp_path):
    summary = finished(write_comparison(tmp_path), lambda cell: None if cell.arm == "adapt" else 9.0)
    assert summary["rows"][0]["perplexity"]["held_out.txt"]["word"] is None
    assert any("beyond a double" in note for note in summary["notes"])
    write_json(tmp_path / "s.json", summary)
    assert tables(summary)


def test_a_model_off_its_target_is_noted(tmp_path):
    comparison, cells = opened(write_comparison(tmp_path))
    for cell in cells.open():
        cells.results.put(cell.key, made_up(cell, 9.0, 160_000 if cell.arm == "adapt" else 140_000))
    notes = summarise(comparison, PruneCells(comparison, Results(comparison.results_path)), {})["notes"]
    assert "adapt at 40%: 5.0% of the original's parameters above the target" in notes
    assert "uniform at 40%: 5.0% of the original's parameters below the target" in notes


def test_models_that_are_the_same_in_every_trial_have_no_interval(tmp_path):
    """Two ways that draw nothing at random: three trials of them are one observation."""

    def word(cell):
        return 30.0 if cell.job is None or cell.arm != "adapt" else 29.0

    summary = finished(write_comparison(tmp_path, seeds=[0, 1, 2], sparsities=[0.2]), word)
    row = next(row for row in summary["rows"] if row["name"] == "adapt")
    ratio = row["perplexity"]["held_out.txt"]["ratio"]
    assert ratio["mean"] == pytest.approx(29 / 30) and ratio["shown"] == "no interval"
    assert ratio["t_interval"] is ratio["bootstrap_interval"] is None
    assert any("is one model in all trials, and so is" in note for note in summary["notes"])
    assert headline(summary).endswith("(copies of one model: no interval)")
    few = finished(write_comparison(tmp_path / "few", seeds=[0, 1], sparsities=[0.2]), word)
    assert headline(few).endswith("(too few for an interval)")


def test_scores_are_averaged_by_trial_and_compared_with_the_controls(tmp_path):
    """Perplexities are in no average, nor is a trial that lacks a task."""

    def scored(seed, *scores, perplexity=400.0):
        names = ("arc_easy", "piqa", "winogrande")
        found = {name: {"acc": score, "main_metric": "acc"} for name, score in zip(names, scores, strict=False)}
        found["wikitext"] = {"word_perplexity": perplexity, "main_metric": "word_perplexity"}
        return {"settings": {"seed": seed}, "tasks": {"results": found}}

    own = {0: scored(0, 0.5, 0.7, 0.3), 1: scored(1, 0.4, 0.7, 0.4), 2: scored(2, 0.6, 0.6, 0.6), 3: scored(3, 0.9)}
    other = {
        0: scored(0, 0.4, 0.6, 0.2),
        1: scored(1, 0.4, 0.7, 0.1),
        2: scored(2, 0.3, 0.6, 0.6),
        4: scored(4, 0, 0, 0),
    }
    found = tasks_average(own, other)
    assert found["by_seed"] == {"0": pytest.approx(0.5), "1": pytest.approx(0.5), "2": pytest.approx(0.6)}
    assert found["mean"] == pytest.approx(1.6 / 3)
    assert found["difference"]["by_seed"] == {str(seed): pytest.approx(0.1) for seed in range(3)}
    assert tasks_average(own, {})["difference"] is None
    assert tasks_average({0: scored(0, 0.5)}, {}) == tasks_average({}, other) == {}

    summary = finished(write_comparison(tmp_path, seeds=[0], sparsities=[0.2]), lambda cell: 20.0)
    for row in [*summary["rows"], summary["original"]]:
        row["tasks"]["wikitext"] = {"metric": "word_perplexity", "mean": 400.0}
        row["tasks_average"] = found
    summary["rows"][0]["tasks"] = {}  # not measured: no row
    table = next(table for table in tables(summary) if table.title == "Tasks")
    assert table.header[-2:] == ("average", "minus control") and "of perplexities lower" in table.note
    assert len(table.rows) == len(summary["rows"])
    assert {row[-2] for row in table.rows} == {"0.5333"} and table.rows[0][-1].startswith("+0.10000")


def test_texts_of_one_stem_have_a_plot_each(tmp_path):
    summary = finished(write_comparison(tmp_path, seeds=[0], sparsities=[0.2]), lambda cell: 20.0)
    summary["texts"] = ["held_out.txt", "held_out.jsonl"]
    for row in [*summary["rows"], summary["original"]]:
        row["perplexity"]["held_out.jsonl"] = row["perplexity"]["held_out.txt"]
    names = [path.name for path in draw(summary, tmp_path / "plots")]
    assert names[:2] == ["perplexity_held_out.txt.png", "perplexity_held_out.jsonl.png"]
