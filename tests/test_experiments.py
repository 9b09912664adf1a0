"""Experiments' configs load, and those that share results share what they start from."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from tiny_models import batches, tiny_model

from graftlm.comparing.config import load_comparison
from graftlm.comparing.pruning.cells import PruneCells
from graftlm.comparing.pruning.config import load_prune_comparison
from graftlm.comparing.results import Results
from graftlm.configuring import load_config
from graftlm.pruning.prune import prune

FOLDER = Path(__file__).parents[1] / "experiments"
COMPARED = sorted(path for path in FOLDER.glob("*/*.yaml") if "variants:" in path.read_text())
PRUNING = [path for path in COMPARED if {"prune", "shrink"} & set(yaml.safe_load(path.read_text()))]
COMPARISONS = [path for path in COMPARED if path not in PRUNING]
RUNS = sorted(set(FOLDER.glob("*/*.yaml")) - set(COMPARED))


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_comparison(path):
    found = load_comparison(path)
    assert found.controls and len(found.arms) > 1
    assert len(found.settings.seeds) >= 3
    assert found.settings.results and (FOLDER.parent / found.settings.results).parent == FOLDER / "results"


@pytest.mark.parametrize("path", PRUNING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_comparison_of_pruning(path, tmp_path):
    assert path.parent.name.startswith("adapt_")  # the other paper's tables have numbers, too
    text = tmp_path / "text.txt"
    text.write_text("words")
    written = path.read_text()
    data = [f"data.{i}.path={text}" for i in range(2)] if "data:\n" in written else [f"data.path={text}"]
    own = [f"shrink.eval_data.path={text}"] if "eval_data:" in written else []
    found = load_prune_comparison(path, [*data, f"perplexity={text}", *own])
    assert found.settings.model == "smollm2" and found.settings.data and len(found.arms) > 1
    assert len(found.settings.seeds) == 3 and found.settings.control == found.control
    assert found.settings.results and (FOLDER.parent / found.settings.results).parent == FOLDER / "results"
    cells = list(PruneCells(found, Results(tmp_path / "none.json")).wanted())
    assert len({cell.key for cell in cells}) == len(cells) == 1 + 3 * len(found.arms) * len(found.sizes)


@pytest.mark.parametrize("name", ["adapt_table1", "adapt_table8"])
def test_sizes_as_published(name):
    """Every arm prunes a model at its first size, with less to measure on."""
    found = load_prune_comparison(FOLDER / name / "config.yaml", ["sparsity_of=channels"])
    jobs = [job for arm in found.arms for _, job in arm.by_size]
    assert jobs and not any(job.settings.exact for job in jobs)
    for arm in found.arms:
        settings = arm.by_size[0][1].settings
        fewer = {"iterations": settings.iterations and min(2, settings.iterations), "sheared_steps": 2}
        model = tiny_model(num_hidden_layers=4)
        pruned = prune(model, dataclasses.replace(settings, **fewer), lambda i: batches(1, seed=i))
        if settings.method != "slicegpt":  # whose rotations are more than it cuts from so small a model
            assert pruned.parameters < pruned.original_parameters, arm.name


def test_adapt_accel_and_prune_then_train_see_the_same_tokens():
    for name in ("adapt_table3", "adapt_fig4", "adapt_recovery"):
        found = load_prune_comparison(FOLDER / name / "config.yaml")
        tokens = {
            (run.max_steps, run.max_length, run.per_device_train_batch_size * run.gradient_accumulation_steps)
            for run in (job.task.run for arm in found.arms for _, job in arm.by_size)
        }
        assert len(tokens) == 1


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_run(path):
    load_config(path)


def test_shared_results_have_one_start():
    """Else a control would run once for each folder."""
    bases: dict[tuple[str, ...], list[dict]] = {}
    for path in COMPARISONS:
        content = yaml.safe_load(path.read_text())
        base = {key: value for key, value in content["base"].items() if key != "learning_rate"}
        base["apex"] = {}  # the control has no use for it
        if path.parent.name != "table1":  # at learning rates of its own, chosen on halves of the data
            bases.setdefault((content["results"], str(base["data"])), []).append(base)
    assert len(bases) == 6
    assert all(base == group[0] for group in bases.values() for base in group)
