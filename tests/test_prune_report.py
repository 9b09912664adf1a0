"""Pictures and report of a pruned model, and the sensitivity of each layer."""

import json

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from tiny_models import FAMILIES, batches, tiny_model
from tiny_runs import write_texts

from graftlm.anatomy import read_anatomy
from graftlm.assess import assess
from graftlm.errors import UserError
from graftlm.files import read_json
from graftlm.held_out import mean_loss
from graftlm.models import load_model
from graftlm.pruning.run import run_prune
from graftlm.pruning.sensitivity import UNIFORM, layer_sensitivity, least_important
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.surgery import keep_components
from graftlm.pruning.taylor import taylor
from graftlm.reporting.layers import (
    plot_iterations,
    plot_layers,
    plot_sensitivity,
    plot_shares,
    plot_whole_layers,
    widths,
)
from graftlm.reporting.pruning import _resolved, component_costs, write_report
from graftlm.reporting.style import figure, headline_of


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A folder of `graftlm prune`: 4 layers, 3 iterations."""
    folder = tmp_path_factory.mktemp("pruned")
    settings = PruneSettings(sparsity=0.4, iterations=3, samples=4, sample_length=32)
    data = [str(write_texts(folder / "text.jsonl"))]
    run_prune("tiny-llama", settings, data, folder / "model", progress=False)
    return folder / "model"


def shape(groups: int, channels: int) -> dict[str, int]:
    return {"num_attention_heads": 2 * groups, "num_key_value_heads": groups, "intermediate_size": channels}


# --- the report ------------------------------------------------------------------------------------------------------


def test_report(pruned):
    path = write_report(pruned)
    text, told = path.read_text(), read_json(pruned / "pruning.json")
    assert path == pruned / "report.html"
    assert (pruned / "plots" / "layers.png").exists() and (pruned / "plots" / "iterations.png").exists()
    assert text.count("data:image/png;base64,") == 2
    assert "tiny-llama: 214 k → 135 k parameters" in text and "Adapt-Pruner" in text
    first = told["shapes"][0]
    assert f"<td>{first['intermediate_size']} of 192</td>" in text
    assert f"{told['removed_share']:.1%} fewer than 214 k" in text
    assert '<th scope="row"><code>samples</code></th><td>4</td><td>10</td>' in text  # what differs from the defaults
    for key, value in (("exact", "true"), ("uniform", "null"), ("preset", "null"), ("iterations", "3")):
        assert f'<th scope="row"><code>{key}</code></th><td>{value}</td></tr>' in text
    assert 'alt="Parameters of attention and FFN in every layer, against the original&#39;s: Parameters of ' in text
    assert "http" not in text.replace("https://", "http").split("<pre>")[0].split("src=")[0]


def test_settings_show_the_iterations_that_were_taken():
    for method, given, taken in (("adapt", None, 50), ("adapt", 3, 3), ("llm-pruner", None, 1), ("flap", None, None)):
        assert _resolved({"method": method, "iterations": given})["iterations"] == taken


def test_a_report_needs_no_weights(pruned):
    before = write_report(pruned).read_text()
    weights = pruned / "model.safetensors"
    weights.rename(pruned / "away")
    try:
        assert write_report(pruned).read_text().split("<section")[2] == before.split("<section")[2]
    finally:
        (pruned / "away").rename(weights)


def test_component_costs_add_up(pruned):
    """Parameters of the components that went are those that the model lost."""
    costs, told = component_costs(load_model(str(pruned))), read_json(pruned / "pruning.json")
    gone = {
        part: float(widths(told["original_shapes"], part).sum() - widths(told["shapes"], part).sum()) for part in costs
    }
    lost = sum(gone[part] * costs[part] for part in costs)
    assert lost == told["original_parameters"] - told["parameters"]


def test_a_sliced_model_is_drawn_by_its_layers_parameters(tmp_path, monkeypatch):
    """Its components have all stayed: counted, or at the cost that one has now, they would say that nothing went."""
    drawn = []

    def drawing(parameters, before, path):
        drawn.append((list(parameters), list(before)))
        return plot_whole_layers(parameters, before, path)

    monkeypatch.setattr("graftlm.reporting.pruning.plot_whole_layers", drawing)
    settings = PruneSettings(method="slicegpt", sparsity=0.3, samples=4, sample_length=32)
    data = [str(write_texts(tmp_path / "text.jsonl"))]
    run_prune("tiny-llama", settings, data, tmp_path / "model", progress=False)
    told = read_json(tmp_path / "model" / "pruning.json")
    (now, before) = drawn[0]
    assert (now, before) == (told["layer_parameters"], told["original_layer_parameters"])
    assert sum(now) < 0.9 * sum(before)
    assert f"<td>{now[0]:,} of {before[0]:,}</td>" in (tmp_path / "model" / "report.html").read_text()


def test_what_lost_no_component_is_not_drawn_as_whole(tmp_path, monkeypatch):
    lines, notes = [], []
    monkeypatch.setattr(Axes, "plot", lambda self, *args, label=None, **kwargs: lines.append(label))
    monkeypatch.setattr("graftlm.reporting.layers.legend", lambda *_: None)
    monkeypatch.setattr("graftlm.reporting.layers.save", lambda made, path: path)
    monkeypatch.setattr(
        "graftlm.reporting.layers.figure", lambda *args, note, **kwargs: notes.append(note) or figure(*args, **kwargs)
    )
    original = [shape(3, 64)] * 4
    models = {"adapt": [shape(2, 64)] * 4, "sliced": original, "depth": original[:2]}
    plot_shares(models, original, "t", tmp_path / "a.png")
    assert set(lines) == {"adapt"}
    assert "sliced, depth" in notes[0]


def test_not_a_pruned_model(tmp_path):
    with pytest.raises(UserError, match=r"no pruning\.json; name a folder that graftlm prune wrote"):
        write_report(tmp_path)


def test_a_report_of_one_step_without_layers(pruned, tmp_path):
    """Depth pruning: fewer layers, no importance, one step; and text from outside is not markup."""
    told = read_json(pruned / "pruning.json")
    told |= {"shapes": told["shapes"][:3], "model": "<b>x", "held_out_loss": None, "notes": ["layer <1> went"]}
    told["steps"] = [{**told["steps"][0], "shapes": told["shapes"], "layer_importance": None}]
    (tmp_path / "pruning.json").write_text(json.dumps(told))
    (tmp_path / "config.json").write_text((pruned / "config.json").read_text())
    text = write_report(tmp_path).read_text()
    assert "&lt;b&gt;x" in text and "layer &lt;1&gt; went" in text
    assert text.count("data:image/png;base64,") == 1


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures(tmp_path, monkeypatch):
    original, now = [shape(3, 64)] * 4, [shape(3, 64), shape(1, 10), shape(0, 0), shape(2, 33)]
    assert plot_layers(now, original, tmp_path / "a.png").stat().st_size > 1000
    assert plot_layers(now[:2], original, tmp_path / "b.png", {"attention": 100, "FFN": 3}).exists()
    assert plot_shares({"x": now, "y": original, "z": now[:2]}, original, "t", tmp_path / "c.png").exists()
    step = {"iteration": 1, "shapes": now, "layer_importance": [0.0, 1.0, -0.5, 0.1], "parameters": 900}
    assert plot_iterations([step], original, 1000, tmp_path / "d.png") is None
    several = [step, {**step, "iteration": 2, "layer_importance": None, "parameters": 800}]
    made = []
    monkeypatch.setattr("graftlm.reporting.layers.save", lambda figure, path: made.append(figure) or path)
    for steps, panels in ((several, 3), ([step, {**step, "iteration": 2}], 4)):
        assert plot_iterations(steps, original, 1000, tmp_path / "d.png") is not None
        pictures = [axes for axes in made[-1].axes if axes.get_title(loc="left")]
        assert len(pictures) == panels and made[-1].get_figwidth() == 9
        assert pictures[panels - 1].get_title(loc="left") == "parameters of the model"
    assert [one.get_suptitle() for one in made] == [f"1 k to {n} parameters in 2 iterations" for n in (800, 900)]
    assert plot_iterations([{**step, "shapes": now[:2]}] * 2, original, 1000, tmp_path / "d.png") is None


# --- sensitivity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "olmo2"])
def test_sensitivity_is_that_of_surgery(family, tmp_path):
    """Masking half of a layer gives the loss of the model that has lost it. (OLMo2's norm over all heads would be over
    fewer.)"""
    model = tiny_model(family)
    calibration, held_out = batches(2), batches(3, seed=5)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = layer_sensitivity(model, calibration, held_out, 0.5)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert found["none"]["loss"] == pytest.approx(mean_loss(model, held_out), abs=1e-6)
    assert [one["layer"] for one in found["layers"]] == [0, 1]
    assert [one["share"] for one in found["uniform"]] == list(UNIFORM)
    for layer in (0, 1):
        other = tiny_model(family)
        scores = taylor(other, read_anatomy(other, smallest=1).blocks, calibration)
        kept = {}
        for block in read_anatomy(other, smallest=1).blocks:
            if block.layer == layer:
                order = scores[block.name].argsort(stable=True)
                kept[block.name] = order[block.components // 2 :].sort().values
        loss = mean_loss(keep_components(other, kept), held_out)
        assert found["layers"][layer]["loss"] == pytest.approx(loss, abs=1e-5)
        assert found["layers"][layer]["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert plot_sensitivity(found, tmp_path / "s.png").exists()


def test_what_goes_from_a_layer():
    heads, channels = read_anatomy(tiny_model(), smallest=1).blocks[:2]
    assert (heads.components, heads.slots) == (2, 2)
    assert least_important(heads, torch.tensor([3.0, 1.0]), 0.5).tolist() == [2, 3]
    assert least_important(heads, torch.tensor([3.0, 1.0]), 0.99).tolist() == [2, 3]  # one stays
    assert least_important(heads, torch.tensor([3.0, 1.0]), 0.0).tolist() == []
    scores = torch.arange(channels.components).float()
    assert least_important(channels, scores, 0.25).tolist() == list(range(channels.components // 4))


def test_assess_with_sensitivity(tmp_path, capsys):
    data = write_texts(tmp_path / "text.jsonl", 6)
    assess("tiny-llama", str(data), tmp_path / "out", samples=4, max_length=64, prune_sensitivity=0.5)
    found = read_json(tmp_path / "out" / "assessment.json")["models"][0]["sensitivity"]
    assert found["share"] == 0.5 and len(found["layers"]) == 4
    assert (tmp_path / "out" / "plots" / "sensitivity.png").exists()
    printed = " ".join(capsys.readouterr().out.split())
    assert "without 50% of the key-value groups" in printed and "layer, of 4 the three missed most" not in printed
    headline = headline_of(tmp_path / "out" / "plots" / "sensitivity.png")
    assert headline.startswith("tiny-llama: perplexity without 50% of one layer: layer ")
