"""What a comparison of ways of pruning shows: paired differences, tables, notes."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
from tiny_comparisons import ENVIRONMENT
from tiny_prune_comparisons import opened, write_comparison

from graftlm.comparing.pruning.cells import PruneCells
from graftlm.comparing.pruning.summary import summarise
from graftlm.comparing.pruning.tables import csv_text, tables
from graftlm.comparing.results import Results
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
    assert found["difference"]["by_seed"] == {"0": -5.0, "1": -6.0, "2": -7.0} and found["lower_in"] == 3
    assert found["difference"]["shown"] == "lower" and found["word"]["mean"] == pytest.approx(34)
    assert found["difference"]["bootstrap_interval"] == pytest.approx((-7, -5))
    assert summary["rows"][1]["perplexity"]["held_out.txt"]["difference"] is None
    assert summary["rows"][0]["gone"]["mean"] == pytest.approx(0.25)
    assert summary["rows"][0]["components_gone"]["channels"]["mean"] == 0.5
    shown = tables(summary)
    assert [table.title for table in shown] == ["Perplexity on held_out.txt", "Sizes and costs", "Tasks"]
    assert shown[0].rows[1][:5] == ("20%", "adapt", "150 k", "3", "34.00 ± 9.00")
    assert shown[1].rows[0][3] == "−10" and "3 of 3" in shown[0].rows[1]
    assert "uniform (control)" in latex_of(shown) and "20 words" in shown[0].note
    rows = list(csv.DictReader(io.StringIO(csv_text(summary))))
    assert len(rows) == 12 and float(rows[0]["minus_control held_out.txt"]) == -5
    assert rows[3]["control"] == "yes" and rows[0]["piqa"] == "0.5"


def test_two_trials_have_no_interval(tmp_path):
    summary = finished(write_comparison(tmp_path, seeds=[0, 1]), lambda cell: 30.0 + len(cell.arm))
    gap = summary["rows"][0]["perplexity"]["held_out.txt"]["difference"]
    assert gap["t_interval"] is None and gap["bootstrap_interval"] is None and gap["shown"] == "too few seeds"
    assert any("too few for an interval" in note for note in summary["notes"])


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
