"""Benchmarks run, say what they promise, and compare ways that compute the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_loop import begun, random_operators
from tiny_models import tiny_model

from graftlm.reference import effective

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # they import each other as scripts do

TINY = ["--model", "tiny-llama", "--rows", "2", "--length", "32"]


def last_line(name: str, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_concatenating_builds_the_same_weights(family):
    from ways import _Concatenated

    model = tiny_model(family, torch.float64, num_key_value_heads=4, num_attention_heads=8)
    apex, _ = begun(model)
    random_operators(apex)
    for expansion in apex.expansions:
        expansion.restore()
        for mixed in expansion.mixed():
            raw = model.get_parameter(mixed.piece.name).data
            dim = mixed.piece.dim
            built = _Concatenated([mixed], raw.shape[dim], dim)(raw)
            expected = effective(raw, mixed.tie, mixed.piece, expansion.choice)
            assert not torch.equal(built, raw)
            torch.testing.assert_close(built, expected, rtol=1e-12, atol=1e-12)


def test_operations_fall_with_the_number_of_tokens():
    found = last_line("flops", *TINY, "--tokens", "64", "6400")
    ratios = found["apex_full_flops_ratio"]
    assert 1 < ratios["6400"] < ratios["64"]
    assert (ratios["64"] - 1) / (ratios["6400"] - 1) == pytest.approx(100, rel=0.01)


def test_assessment_is_measured():
    found = last_line("assessment", *TINY, "--rounds", "1")
    assert 0 < found["assessment_share"] < 1
    assert found["recorder_seconds_median"] > 0


def test_pruning_is_measured():
    words = ["--model", "tiny-llama", "--short", "--length", "16", "--iterations", "4", "--parts", "whole"]
    whole = last_line("prune", *words)["whole"]
    assert whole["iterations"] == 2 and whole["seconds_per_iteration"] > 0 and whole["samples"] == 10
    assert whole["flops_per_second"] > 0 and whole["peak_bytes"] > 0


@pytest.mark.slow
def test_step_cost_says_what_it_promises():
    found = last_line("step_cost", *TINY, "--rounds", "2")
    for key in ("apex_full_step_ratio", "trainer_vs_bare_step_ratio"):
        low, high = found[f"{key}_interval"]
        assert 0 < low <= found[key] <= high
    assert 0 < found["apex_span_share"] < 1
    assert found["apex_full_memory_ratio"] > 0.5


@pytest.mark.slow
def test_small_regime_says_what_it_promises():
    two_layers = ["--model", "135m", "--layers", "2", "--rows", "2", "--length", "32"]
    found = last_line("small_regime", *two_layers, "--rounds", "2", "--budgets", "0.024", "--all")["budgets"]["0.024"]
    for name in ("apex_small", "dora", "s2ft"):
        low, high = found[f"{name}_step_ratio_vs_lora_interval"]
        assert 0 < low <= found[f"{name}_step_ratio_vs_lora"] <= high
    for name in ("apex_small", "s2ft"):
        assert found[f"{name}_trainable"] == pytest.approx(found["lora_trainable"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["full", "trainer", "autograd", "small"])
def test_the_gpu_benchmark_can_be_tried_on_a_cpu(part):
    small = ["--model", "135m", "--layers", "1", "--length", "32", "--rows", "2", "--rounds", "1"]
    found = last_line("gpu", part, *small, "--no-autocast", "--budget", "0.05")[part]
    assert all(way["tokens_per_second"] > 0 for way in found["ways"].values())


def test_the_page_has_the_figures_of_the_committed_runs():
    from tables import RESULTS, table

    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert table(json.loads(RESULTS.read_text(encoding="utf-8"))) in page
    again = page.partition("cpu_again.json -->\n")[2].partition("\n\n")[0].splitlines()
    known = table(json.loads((RESULTS.parent / "cpu_again.json").read_text(encoding="utf-8"))).splitlines()
    assert len(again) > 8 and set(again) <= set(known)
