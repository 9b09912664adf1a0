"""report.html of a shrink, and `graftlm report` on whatever folder it is given."""

import io
import shutil

import pytest
from rich.console import Console
from tiny_shrinks import ORIGINAL, quiet_shrink, tiny_shrink

from graftlm.errors import UserError
from graftlm.files import read_json, write_json
from graftlm.pruning.shrink.config import load_shrink
from graftlm.pruning.shrink.story import print_summary, rows
from graftlm.reporting import figures
from graftlm.reporting.folders import report_on
from graftlm.reporting.rundata import read_run
from graftlm.reporting.shrinking import _as_one_run, write_report


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shrunk")
    quiet_shrink(tiny_shrink(folder))
    return folder / "run"


@pytest.fixture
def begun(shrunk, tmp_path):
    """A copy that was interrupted in its third phase."""
    shutil.copytree(shrunk, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run/phase_03/train/summary.json").unlink()
    shutil.rmtree(tmp_path / "run/model")
    return tmp_path / "run"


def test_numbers_are_whole_in_a_file(shrunk):
    """A console of 80 characters, which is what rich takes a file for, would cut them off."""
    file = io.StringIO()
    summary = read_json(shrunk / "summary.json")
    task = load_shrink(shrunk / "config.yaml")
    print_summary(task, summary, console=Console(file=file, width=80))
    text = file.getvalue()
    assert "…" not in text and all(name in text for name in rows(summary)[0])
    assert all(cell in text for row in rows(summary)[1:] for cell in row)


def test_report(shrunk):
    summary = read_json(shrunk / "summary.json")
    path = report_on(shrunk)
    text = path.read_text()
    assert path == shrunk / "report.html"
    plots = {"phases", "loss_tokens", "loss_seconds", "learning_rate", "layers", "iterations"}
    assert {file.stem for file in (shrunk / "plots").iterdir()} == plots
    assert text.count("data:image/png;base64,") == len(plots)
    assert f"<b>{summary['parameters']:,}</b>" in text
    assert f"tiny-llama: {figures.count(ORIGINAL)} → {figures.count(summary['parameters'])} parameters" in text
    for phase in summary["phases"]:
        assert f"{phase['phase']}</th><td>{phase['parameters']:,}</td>" in text
        for when in ("before_pruning", "after_pruning", "end"):
            assert f"<td>{phase[f'eval_loss_{when}']:.4f}</td>" in text
    assert f"<td>{summary['shapes'][0]['intermediate_size']} of 192</td>" in text
    took = f"training took {figures.duration(summary['seconds'])} of {figures.duration(summary['total_seconds'])}"
    assert f"against seconds: shrinking, plain training: {took}" in text
    assert "has not ended" not in text
    assert "<code>interleaves</code></th><td>3</td><td>null</td>" in text
    assert "<code>train.learning_rate</code></th><td>0.001</td><td>2.0e-05</td>" in text
    assert "recovery</code></td>" not in text  # is the default
    assert "http" not in text.replace("https://", "http").split("<pre>")[0].split("src=")[0]


def test_a_sliced_model_is_drawn_by_its_layers_parameters(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("graftlm.reporting.pruning.plot_whole_layers", lambda *given: drawn.append(given))
    changes = {"prune": {"method": "slicegpt", "iterations": None, "samples": 8}, "interleaves": 1, "max_steps": 1}
    quiet_shrink(tiny_shrink(tmp_path, **changes))
    write_report(tmp_path / "run")
    now, before, _ = drawn[-1]
    assert before == read_json(tmp_path / "run/summary.json")["original_layer_parameters"]
    assert sum(now) < 0.9 * sum(before)


def test_curves_step_where_a_phase_prunes(shrunk):
    summary = read_json(shrunk / "summary.json")
    run = _as_one_run(read_run(shrunk), load_shrink(shrunk / "config.yaml"), summary)
    steps, losses = run.series("eval", "step", "loss")
    for phase in summary["phases"]:
        here = losses[steps == phase["first_step"]]
        assert here[0] == phase["eval_loss_before_pruning"]
        assert phase["eval_loss_after_pruning"] in here[1:]
    assert losses[-1] == summary["eval_loss_end"]
    assert len(run.series("train", "step")[0]) == 12


def test_report_of_a_shrink_still_going(begun):
    text = write_report(begun).read_text()
    assert "2 of 3 phases are finished" in text
    assert f"go on with <code>graftlm shrink {begun}/config.yaml</code>" in text
    assert "2</th>" in text and 'id="next"' not in text
    shutil.rmtree(begun / "phase_01/train")
    shutil.rmtree(begun / "phase_02/train")
    with pytest.raises(UserError, match="none of its 3 phases has ended"):
        write_report(begun)


def test_report_on_other_folders(shrunk, tmp_path):
    assert "pruned with Adapt-Pruner" in report_on(shrunk / "phase_01/pruned").read_text()
    assert report_on(shrunk / "phase_01/train").exists()
    with pytest.raises(UserError, match="is a model, which tells nothing of how it was made; name the folder of its"):
        report_on(shrunk / "model")
    write_json(tmp_path / "comparison.json", {})
    with pytest.raises(UserError, match="is a comparison, whose report graftlm compare writes"):
        report_on(tmp_path)
    with pytest.raises(UserError, match="is a file; name the folder"):
        report_on(tmp_path / "comparison.json")
    with pytest.raises(UserError, match="no such folder"):
        report_on(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no phases\.json"):
        write_report(tmp_path)
