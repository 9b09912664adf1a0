"""Reading a run folder and plotting it. `fake_run`, which writes one, serves the other reporting tests too."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from graftlm.errors import UserError
from graftlm.reporting import choices, distributions
from graftlm.reporting.choices import heads_chosen, kept
from graftlm.reporting.curves import smooth
from graftlm.reporting.plots import make_plots, plot_activations, plot_sigma
from graftlm.reporting.report import make_report
from graftlm.reporting.rundata import read_run
from graftlm.reporting.style import BEFORE, CONTROL, RUN, colours, figure, legend, lines

ALL_PLOTS = [
    "loss_tokens.png",
    "loss_seconds.png",
    "learning_rate.png",
    "activations_heads.png",
    "activations_channels.png",
    "sigma.png",
    "stages.png",
]


def fake_run(
    folder: Path,
    *,
    method: str = "apex",
    control: bool = True,
    finished: bool = True,
    model: str = "tiny-llama",
    layers: int = 4,
    heads: int = 9,
    channels: int = 64,
    steps: int = 60,
    stages: int = 3,
    seed: int = 0,
) -> dict:
    """Write a run folder as `graftlm train` does, with falling losses and long-tailed activations; its summary."""
    draw = np.random.default_rng(seed)
    noise = draw.normal(0, 0.12, steps)
    write_config(folder, method, model, control)
    (folder / "environment.json").write_text(
        json.dumps({"python": "3.11", "packages": {"torch": "2.13.0"}, "cpu": "<b>fast</b>"})
    )
    own = half_run(folder, draw, noise, method, 0.0, finished, layers, heads, channels, steps, stages)
    own |= {
        "fused_max_abs_logit_difference": 0.0 if method == "apex" else None,
        "control": None,
        "data": {
            "documents": 1234,
            "tokens": 987654,
            "blocks": 964,
            "supervised_share": 0.873,
            "truncated_share": 0.012,
            "evaluation_blocks": 64,
            "evaluation_tokens": 65_536,
            "epochs": 0.4976,
        },
        "plan": {"estimated_seconds": 100.0, "estimated_peak_memory_bytes": 3 * 2**30},
        "notes": ["one key-value head: attention is not expanded"],
    }
    if control:
        other = half_run(folder / "control", draw, noise, "full", 0.008, finished, layers, heads, channels, steps, 1)
        own["control"] = {key: value for key, value in other.items() if key != "stages"}
    if finished:
        (folder / "summary.json").write_text(json.dumps(own))
    return own


def write_config(folder: Path, method: str, model: str, control: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model": model, "data": [{"path": "corpus/train.txt"}], "method": method, "control": control}
    config |= {"max_length": 512, "learning_rate": 2e-5, "apex": {"k_channels": 0.25, "stages": 3}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def half_run(folder, draw, noise, method, gap, finished, layers, heads, channels, steps, stages) -> dict:
    """The run's or the control's part of a run folder; its summary."""
    folder.mkdir(parents=True, exist_ok=True)
    length, tokens_a_step = steps // stages, 8192
    lines, evals = [], []

    def loss_at(step: int) -> float:
        return 2.9 + 0.45 * math.exp(-3 * step / steps) + gap * step / steps

    def evaluate(step: int, when: str, stage: int) -> float:
        evals.append(loss_at(step))
        record = {"event": "eval", "step": step, "tokens": step * tokens_a_step, "seconds": step * 1.7 * (1 - 2 * gap)}
        lines.append(record | {"loss": loss_at(step), "when": when, "stage": stage})
        return loss_at(step)

    evaluate(0, "start", 0)
    story = []
    for step in range(1, steps + 1):
        stage = min((step - 1) // length, stages - 1)
        if (step - 1) % length == 0 and method == "apex":
            story.append({"stage": stage, "step": step - 1, "tokens": (step - 1) * tokens_a_step, "steps": length})
            story[-1]["eval_loss_start"] = evaluate(step - 1, "stage_start", stage)
        record = {"event": "train", "step": step, "tokens": step * tokens_a_step, "seconds": step * 1.7 * (1 - 2 * gap)}
        record |= {"loss": loss_at(step) + noise[step - 1], "learning_rate": 2e-5 * math.cos(1.5 * step / steps)}
        lines.append(record | {"grad_norm": float(draw.lognormal(0, 0.3)), "tokens_per_second": 4800.0, "stage": stage})
        if step % length == 0 and method == "apex":
            story[-1]["eval_loss_before_fusion"] = evaluate(step, "before_fusion", stage)
            story[-1]["eval_loss_after_fusion"] = evaluate(step, "after_fusion", stage)
        elif step % 20 == 0 and method == "full":
            evaluate(step, "periodic", stage)
    evaluate(steps, "end", stages - 1)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_activations(folder / "activations.safetensors", draw, layers, heads, channels, ("before", "after"))
    for entry in story:
        for kind, n, k in (("heads", heads, heads // 3), ("channels", channels, channels // 8)):
            entry[kind] = {str(layer): choose(draw, n, k) for layer in range(layers)}
        entry["effective_k"] = {"heads": (heads // 3) / heads, "channels": 0.125}
    return {
        "method": method,
        "model": "tiny-llama",
        "tokens": steps * tokens_a_step,
        "steps": steps,
        "seconds": lines[-1]["seconds"],
        "tokens_per_second": 4819.0 if method == "apex" else 4897.0,
        "peak_memory_bytes": 3_221_225_472 if method == "apex" else 3_100_000_000,
        "trainable_parameters": 135_700_000,
        "total_parameters": 134_515_008,
        "trainable_fraction": 1.0088,
        "operator_parameters": 1_184_992 if method == "apex" else 0,
        "eval_loss_start": evals[0],
        "eval_loss_end": evals[-1],
        "stages": story,
    }


def choose(draw, n: int, k: int) -> dict[str, list[int]]:
    """P and N of a module: mostly the same ones at every stage, as in a real run."""
    order = np.argsort(np.arange(n) + draw.normal(0, n / 8, n))
    return {"advantageous": sorted(order[:k].tolist()), "disadvantageous": sorted(order[-k:].tolist())}


def write_activations(path: Path, draw, layers: int, heads: int, channels: int, moments: tuple[str, ...]) -> None:
    tensors = {
        f"{when}/{kind}/{layer}": draw.lognormal(0, spread - 0.2 * late, n).astype(np.float32) * (layer + 1)
        for late, when in enumerate(moments)
        for kind, n, spread in (("heads", heads, 0.9), ("channels", channels, 1.6))
        for layer in range(layers)
    }
    save_file(tensors, str(path), metadata={"samples": "256"})


@pytest.fixture(scope="module")
def run_and_summary(tmp_path_factory) -> tuple[Path, dict]:
    """A finished APEX run with its control, and its report already made. Tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    summary = fake_run(folder)
    make_report(folder)
    return folder, summary


# --- reading a run folder


def test_reads_what_a_run_wrote(run_and_summary):
    folder, summary = run_and_summary
    data = read_run(folder)
    assert data.finished and data.method == "apex" and data.activation_samples == 256
    assert data.control is not None and data.control.method == "full"
    assert data.summary == summary
    steps, losses = data.series("train", "step", "loss")
    assert steps.tolist() == list(range(1, 61)) and np.isfinite(losses).all()
    assert list(data.activations["before"]["channels"]) == [0, 1, 2, 3]
    assert data.activations["before"]["channels"][0].shape == (64,)


def test_layers_come_in_the_order_of_their_number(tmp_path):
    fake_run(tmp_path, layers=12, control=False)
    assert list(read_run(tmp_path).activations["after"]["heads"]) == list(range(12))


def test_a_torn_last_line_is_left_out(tmp_path):
    fake_run(tmp_path, control=False)
    whole = read_run(tmp_path).metrics
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 61, "tok')
    assert read_run(tmp_path).metrics == whole


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    fake_run(tmp_path, control=False)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines[4] = lines[4][:20]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 5"):
        read_run(tmp_path)


def test_steps_repeated_after_a_resume_count_once(tmp_path):
    fake_run(tmp_path, control=False)
    path = tmp_path / "metrics.jsonl"
    once = read_run(tmp_path).metrics
    lines = path.read_text().splitlines()
    cut = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 31)
    killed = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 50)
    path.write_text("\n".join(lines[:killed] + lines[cut:]) + "\n")
    assert read_run(tmp_path).metrics == once


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "{", "not valid JSON"),
        ("summary.json", "[1]", "expected a mapping"),
        ("config.yaml", "a: [", "not valid YAML"),
        ("activations.safetensors", "junk", "cannot be read"),
    ],
)
def test_broken_files_are_one_line_that_names_them(tmp_path, name, content, message):
    fake_run(tmp_path, control=False)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_run(tmp_path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        make_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a run folder"):
        make_plots(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- plots


def test_plots_open_and_have_sane_sizes(run_and_summary):
    folder, _ = run_and_summary
    assert sorted(path.name for path in (folder / "plots").iterdir()) == sorted(ALL_PLOTS)
    for name in ALL_PLOTS:
        with Image.open(folder / "plots" / name) as image:
            image.load()
            assert image.format == "PNG"
            assert 800 <= image.width <= 2400 and 500 <= image.height <= 1600
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50, f"{name} looks empty"


def test_many_labels_are_told_apart():
    many = ["before", "control", "control with the schedule of lora", "lora-no-control", *map(str, range(26))]
    chosen = colours(many)
    assert [name for name, colour in chosen.items() if colour == CONTROL] == ["control"]
    assert chosen["before"] == BEFORE and chosen["control with the schedule of lora"] == RUN
    look = lines(chosen)
    assert list(look) == many and len({(line["color"], line["linestyle"]) for line in look.values()}) == len(many)


def test_make_plots_lists_what_it_wrote(tmp_path):
    fake_run(tmp_path, control=False, stages=1)
    made = make_plots(tmp_path)
    assert [path.name for path in made] == ALL_PLOTS
    assert all(path.is_file() for path in made)


def test_plots_for_models_side_by_side(tmp_path):
    draw = np.random.default_rng(1)

    def model(n):
        return {kind: {layer: draw.random(n, dtype=np.float32) for layer in range(3)} for kind in ("heads", "channels")}

    side_by_side = {"model-a": model(8), "some/very/long/path/to/model-b": model(12)}
    for kind in ("heads", "channels"):
        assert plot_activations(side_by_side, kind, tmp_path / f"{kind}.png") == tmp_path / f"{kind}.png"
    assert plot_sigma(side_by_side, tmp_path / "sigma.png") == tmp_path / "sigma.png"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_kind_that_was_not_measured_has_no_plot(tmp_path):
    only_channels = {"before": {"channels": {0: np.ones(8, np.float32)}}}
    assert plot_activations(only_channels, "heads", tmp_path / "x.png") is None
    assert plot_sigma({}, tmp_path / "y.png") is None
    assert plot_sigma(only_channels, tmp_path / "z.png") is not None


def test_measures_on_known_distributions():
    assert distributions.relative_sigma(np.full(10, 3.0, np.float32)) == 0
    assert distributions.sigma(np.array([0, 0, 4, 4], np.float32)) == 2
    assert distributions.relative_sigma(np.array([0, 0, 4, 4], np.float32)) == 1
    assert distributions.top_share(np.array([1] * 9 + [11], np.float32)) == pytest.approx(0.55)
    assert distributions.top_share(np.zeros(5, np.float32)) == 0
    assert distributions.strongest_of([4, 4]) == "1 of 4" and distributions.strongest_of([30]) == "3 of 30"
    assert distributions.strongest_of([4, 8]) == "10%"


def test_kept_counts_the_overlap_of_sets():
    def stage(p, n):
        return {"channels": {"0": {"advantageous": p, "disadvantageous": n}}}

    stages = [stage([0, 1], [8, 9]), stage([1, 2], [8, 9]), stage([5, 6], [9, 4])]
    assert kept(stages, "channels", "advantageous").tolist() == [[0.5], [0.0]]
    assert kept(stages, "channels", "disadvantageous").tolist() == [[1.0], [0.5]]


def test_heads_chosen_both_ways_are_marked():
    def stage(p, n):
        return {"heads": {"0": {"advantageous": p, "disadvantageous": n}}, "effective_k": {"heads": 0.25}}

    once = heads_chosen([stage([0], [3]), stage([3], [2])])
    assert once.tolist() == [[[1, 0, 0, 1]], [[0, 0, 1, 1]]]
    made = figure("t")
    axes = made.subplots()
    choices._heads_map(made, axes, [stage([0], [3]), stage([3], [2])])
    (crosses,) = axes.lines
    assert (crosses.get_marker(), crosses.get_xdata().tolist(), crosses.get_ydata().tolist()) == ("x", [3], [0])


def test_the_note_explains_crosses_where_there_are_some(tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(choices, "figure", lambda title, **look: notes.append(look["note"]) or figure(title, **look))

    def stage(p, n):
        chosen = {"0": {"advantageous": p, "disadvantageous": n}}
        return {"heads": chosen, "channels": chosen, "effective_k": {"heads": 0.25}}

    choices.plot_stages([stage([0], [3]), stage([0], [2])], tmp_path / "a.png")
    choices.plot_stages([stage([0], [3]), stage([3], [2])], tmp_path / "b.png")
    assert ["×" in note for note in notes] == [False, True]


def test_smoothing_keeps_a_constant_and_survives_nan():
    assert smooth(np.full(20, 2.5), 7) == pytest.approx(np.full(20, 2.5))
    values = np.array([1.0, np.nan, 3.0])
    assert np.isfinite(smooth(values, 3)).all()
    assert smooth(np.array([1.0, 5.0]), 1).tolist() == [1.0, 5.0]


@pytest.mark.parametrize(("length", "columns"), [(5, 4), (40, 2), (90, 1)])
def test_a_legend_has_as_many_columns_as_fit(length, columns):
    made = figure("a title")
    axes = made.subplots()
    for letter in "abcd":
        axes.plot([0, 1], label=letter * length)
    legend(made, axes)
    made.draw_without_rendering()
    box = made.legends[0].get_window_extent()
    assert len(made.legends) == 1 and made.legends[0]._ncols == columns
    assert box.x0 >= 0 and box.x1 <= made.bbox.width
