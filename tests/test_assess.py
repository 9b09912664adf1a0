"""graftlm assess and masking: what is seen, what is written, and what switching components off does."""

import json
import types

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, batches, tiny_model

from graftlm import assess as assessment
from graftlm.anatomy import linear, read_anatomy
from graftlm.errors import UserError
from graftlm.masking import masked, output_columns
from graftlm.models import load_model, load_tokenizer, save_model
from graftlm.pruning.surgery import keep_components
from graftlm.reporting.rundata import read_activations
from graftlm.reporting.style import headline_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"text": f"Line {i}: " + "the quick brown fox jumps over the lazy dog. " * (i % 4)} for i in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_masking_is_zeroing_the_columns_of_the_output_projection(family):
    model = tiny_model(family, torch.float64).eval()
    anatomy = read_anatomy(model)
    ids = batches(1)[0]["input_ids"]
    units = {b.name: torch.tensor([0, b.ranked - 1]) for b in anatomy.blocks}
    plain = model(ids).logits
    with masked(model, anatomy, units):
        seen = model(ids).logits
    assert torch.equal(model(ids).logits, plain)
    for block in anatomy.blocks:
        matrix, columns = output_columns(block, units[block.name])
        assert len(columns) == 2 * block.width
        linear(model, matrix.module).weight[:, columns] = 0
    torch.testing.assert_close(model(ids).logits, seen, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(seen, plain)


def test_masking_everything_leaves_what_the_embedding_says():
    model = tiny_model().eval()
    anatomy = read_anatomy(model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), masked(model, anatomy, {b.name: torch.arange(b.ranked) for b in anatomy.blocks}):
        last = model(ids).logits[0, -1]
        alone = model(ids[:, -1:]).logits[0, -1]
    torch.testing.assert_close(last, alone)  # no head hands anything on from the tokens before


def test_masking_refuses_what_is_not_there():
    model = tiny_model()
    anatomy = read_anatomy(model)
    with (
        pytest.raises(UserError, match="layer9_heads is no block"),
        masked(model, anatomy, {"layer9_heads": torch.tensor([0])}),
    ):
        pass
    with pytest.raises(UserError, match="heads 0 to 3"), masked(model, anatomy, {"layer0_heads": torch.tensor([4])}):
        pass
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("share", [0.5, 0.6, 0.9])
def test_more_than_half_can_be_masked(share, tmp_path, data):
    """P and N, which must have nothing in common, are then those of the default K."""
    out = assessment.assess("tiny-llama", data, tmp_path / "out", samples=4, max_length=32, mask=share)
    masking = json.loads((out / "assessment.json").read_text())["models"][0]["masking"]
    assert masking["share"] == share and masking["top"]["loss"] != masking["none"]["loss"]


@pytest.mark.parametrize(("there", "samples"), [(10, 3), (10, 5), (10, 7), (4, 10), (1, 1)])
def test_sequences_to_measure_on_are_others(there, samples):
    chosen, others = assessment.choose_sequences(there, samples)
    assert len(chosen) == min(there, samples) and len(others) == min(there - len(chosen), samples)
    assert len({*chosen, *others}) == len(chosen) + len(others) and {*chosen, *others} <= set(range(there))


def test_assess_compares_two_models(tmp_path, data, capsys):
    other, tokenizer = load_model("tiny-llama"), load_tokenizer("tiny-llama")
    with torch.no_grad():
        anatomy = read_anatomy(other)
        block = next(b for b in anatomy.blocks if b.name == "layer1_heads")
        rows = block.mixed[0].index(torch.tensor([1]))[0]
        linear(other, block.mixed[0].module).weight[rows] *= 10  # the values of group 1: query heads 2 and 3
    save_model(other, tokenizer, tmp_path / "other")
    out = assessment.assess(
        "tiny-llama", data, tmp_path / "out", compare=str(tmp_path / "other"), samples=8, max_length=64, mask=0.25
    )
    result = json.loads((out / "assessment.json").read_text())
    seen, samples = read_activations(out / "activations.safetensors")
    assert samples == 8
    assert set(seen) == {"tiny-llama", str(tmp_path / "other")}
    first, second = result["models"]
    assert first["samples"] == second["samples"] == 8
    assert 0 < first["tokens"] <= 8 * 64
    np.testing.assert_allclose(
        seen[str(tmp_path / "other")]["heads"][1][2:], 100 * seen["tiny-llama"]["heads"][1][2:], rtol=1e-3
    )
    boosted = second["layers"]["layer1_heads"]
    assert boosted["top"] in ([2], [3])
    assert boosted["sigma_over_mean"] > 3 * first["layers"]["layer1_heads"]["sigma_over_mean"]
    channels = first["layers"]["layer0_channels"]
    assert len(channels["top"]) == len(channels["lowest"]) == 48  # a quarter of 192
    assert not set(channels["top"]) & set(channels["lowest"])
    assert sum(channels["rank_score"]) == 0 and max(channels["rank_score"]) <= 8
    assert min(channels["rank_score"][i] for i in channels["top"]) >= max(
        channels["rank_score"][i] for i in channels["lowest"]
    )
    masking = first["masking"]
    assert len({masking[name]["loss"] for name in ("none", "top", "lowest", "random")}) == 4
    assert not masking["same_sequences"] and masking["sequences"] == 8
    assert masking["none"]["perplexity"] == pytest.approx(np.exp(masking["none"]["loss"]))
    before, after = first["subspaces"]["layer1_heads"]["v"], second["subspaces"]["layer1_heads"]["v"]
    assert before["vectors"] == len(rows) and before["effective_rank_p"] != after["effective_rank_p"]
    assert first["subspaces"]["layer0_channels"] == second["subspaces"]["layer0_channels"]  # the first one's P and N
    for name in ("activations_heads", "activations_channels", "sigma", "subspaces"):
        assert (out / "plots" / f"{name}.png").stat().st_size > 1000
        assert str(tmp_path) not in headline_of(out / "plots" / f"{name}.png")
    assert "(tiny-llama), " in headline_of(out / "plots" / "activations_heads.png")
    assert "strongest 1 of 4 heads" in headline_of(out / "plots" / "activations_heads.png")
    printed = capsys.readouterr().out
    assert "a sample is one conversation" in printed and "tiny-llama without 25%" in printed
    assert "(1 of 4)" in printed and "(19 of 192)" in printed and str(tmp_path / "other") in printed


@pytest.mark.parametrize("smaller_first", [False, True])
def test_models_of_other_widths_have_sets_of_their_own(smaller_first, tmp_path, data, capsys):
    """As an original and what pruning left of it."""
    kept = {"layer0_channels": torch.arange(96), "layer1_channels": torch.arange(96)}
    smaller = keep_components(load_model("tiny-llama"), kept)
    save_model(smaller, load_tokenizer("tiny-llama"), tmp_path / "small")
    names = ["tiny-llama", str(tmp_path / "small")][:: -1 if smaller_first else 1]
    out = assessment.assess(names[0], data, tmp_path / "out", compare=names[1], samples=4, max_length=32)
    _, second = json.loads((out / "assessment.json").read_text())["models"]
    (tmp_path / "run.yaml").write_text(f"data: {data}\n")
    alone = assessment.assess(names[1], str(tmp_path / "run.yaml"), tmp_path / "alone", samples=4, max_length=32)
    (own,) = json.loads((alone / "assessment.json").read_text())["models"]
    assert second["subspaces"] == own["subspaces"]
    assert any("of other widths than the first model's" in note for note in second["notes"])
    assert "the first model's P and N" not in capsys.readouterr().out


def test_padding_and_batches_change_nothing(tmp_path, data, monkeypatch):
    wide = assessment.assess("tiny-llama", data, tmp_path / "wide", samples=8, max_length=64)
    monkeypatch.setattr(assessment, "LOGITS_A_PASS", 1)  # one sequence a pass: nothing is padded
    narrow = assessment.assess("tiny-llama", data, tmp_path / "narrow", samples=8, max_length=64)
    one, other = (read_activations(p / "activations.safetensors")[0]["tiny-llama"] for p in (wide, narrow))
    for kind in one:
        for layer in one[kind]:
            np.testing.assert_allclose(one[kind][layer], other[kind][layer], rtol=1e-4)
    tokens = [json.loads((p / "assessment.json").read_text())["models"][0]["tokens"] for p in (wide, narrow)]
    assert tokens[0] == tokens[1]


def test_two_runs_of_one_model_have_labels_of_their_own(tmp_path, data):
    out = assessment.assess("tiny-llama", data, tmp_path / "out", compare="tiny-llama", samples=4, max_length=32)
    assert list(read_activations(out / "activations.safetensors")[0]) == ["tiny-llama (1)", "tiny-llama (2)"]


@pytest.mark.parametrize(
    ("labels", "short"),
    [
        (["tiny-llama", "/long/way/to/other"], ["tiny-llama", "other"]),
        (["/a/runs/one/model", "/a/runs/two/model"], ["one/model", "two/model"]),
        (["/x/seed0/apex/model", "/x/seed1/apex/model"], ["seed0/apex/model", "seed1/apex/model"]),
        (["/a/one/model/"], ["one/model"]),
        (["Owner/Name"], ["Name"]),
        (["m", "a/m"], ["m", "a/m"]),
        (["model"], ["model"]),
        (["tiny-llama (1)", "tiny-llama (2)"], ["tiny-llama (1)", "tiny-llama (2)"]),
    ],
)
def test_pictures_name_models_as_short_as_can_be(labels, short):
    assert assessment.short_names(labels) == short


def test_the_table_of_layers_says_which_it_shows():
    def title(layers):
        found = [{"layer": i, "loss": 3.0 + i} for i in range(layers)]
        told = {"share": 0.5, "none": {"loss": 3.0}, "uniform": [], "layers": found}
        table = assessment._sensitivity_table(types.SimpleNamespace(label="m", sensitivity=told))
        return table.title.plain, list(table.columns[0].cells)

    said, rows = title(6)
    assert said.endswith("of one layer, of 6 the three missed most and the one missed least")
    assert rows == ["nothing", "layer 5", "layer 4", "layer 3", "layer 0"]
    assert title(4)[0].endswith("of one layer")


def test_where_it_cannot_be_written_is_said_first(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="out: is a file; give a folder as --out"):
        assessment.assess("no/such/model", str(tmp_path / "nothing.txt"), tmp_path / "out")


@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "pruning.json", "config.json"])
def test_a_run_is_not_written_over(tmp_path, data, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(UserError, match="run: holds a run, whose files would be written over; give another --out"):
        assessment.assess("tiny-llama", data, tmp_path / "run", samples=2)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_bad_data_writes_nothing(tmp_path):
    with pytest.raises(UserError):
        assessment.assess("tiny-llama", str(tmp_path / "nothing.txt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
