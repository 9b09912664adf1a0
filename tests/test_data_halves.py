"""Held-out data: what is chosen, what to choose on apart from what is reported, halves of a source's documents."""

import json
import re

import pytest
from test_data_support import byte_tokenizer, conversation, run_config, write_jsonl
from tiny_runs import tiny_config, words, write_texts

from graftlm.errors import UserError
from graftlm.models import load_tokenizer
from graftlm.training.config import SourceConfig
from graftlm.training.data import prepare_data
from graftlm.training.data.pipeline import hold_out_score
from graftlm.training.data.sources import iterate_rows, source_identity
from graftlm.training.run import train_one


def texts(path, **settings) -> list[str]:
    return [row.fields["text"] for row in iterate_rows(SourceConfig(str(path), **settings))]


def test_halves_have_nothing_in_common_and_miss_nothing(tmp_path):
    path = write_texts(tmp_path / "t.jsonl", 7)
    even, odd = texts(path, half="even"), texts(path, half="odd")
    assert even == [words(60, i) for i in (0, 2, 4, 6)]
    assert odd == [words(60, i) for i in (1, 3, 5)]
    assert texts(path, half="odd", limit=4) == odd[:2]  # of the first four documents


def test_a_long_document_stays_in_one_half(tmp_path, monkeypatch):
    from graftlm.training.data import readers

    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 100)
    path = write_texts(tmp_path / "t.jsonl", 3)
    assert "".join(texts(path, half="even")) == words(60, 0) + words(60, 2)
    assert "".join(texts(path, half="odd")) == words(60, 1)


def test_an_empty_half_is_said(tmp_path):
    config = tiny_config(tmp_path, eval_data=(SourceConfig(str(write_texts(tmp_path / "one.jsonl", 1)), half="odd"),))
    with pytest.raises(UserError, match=r"one\.jsonl: no document in it of odd number"):
        prepare_data(config, load_tokenizer("tiny-llama"), progress=False)


def test_a_source_without_half_is_known_as_before(tmp_path):
    path = write_texts(tmp_path / "t.jsonl", 2)
    assert "half" not in source_identity(SourceConfig(str(path)))
    assert source_identity(SourceConfig(str(path), half="odd"))["half"] == "odd"


@pytest.mark.parametrize("streaming", [False, True])
def test_selection_data(tmp_path, streaming):
    path = str(write_texts(tmp_path / "h.jsonl", 4, first=50))
    halves = {"eval_data": (SourceConfig(path, half="odd"),), "selection_data": (SourceConfig(path, half="even"),)}
    config = tiny_config(tmp_path, streaming=streaming, eval_max_blocks=50, **halves)
    tokenizer = load_tokenizer("tiny-llama")
    data = prepare_data(config, tokenizer, progress=False)
    read = ["".join(tokenizer.decode(item["input_ids"]) for item in part) for part in (data.evaluation, data.selection)]
    for text, own, other in zip(read, ((1, 3), (0, 2)), ((0, 2), (1, 3)), strict=True):
        assert all(words(60, 50 + i) in text for i in own)
        assert not any(words(60, 50 + i) in text for i in other)


def test_a_run_reports_both_losses_and_each_is_what_it_is_alone(tmp_path):
    a, b = (str(write_texts(tmp_path / f"{name}.jsonl", 1, first=first)) for name, first in (("a", 50), ("b", 60)))
    both, one, other = (
        train_one(tiny_config(tmp_path / name, max_steps=3, data=write_texts(tmp_path / "t.jsonl"), **held))
        for name, held in (
            ("both", {"eval_data": (SourceConfig(a),), "selection_data": (SourceConfig(b),)}),
            ("one", {"eval_data": (SourceConfig(a),)}),
            ("other", {"eval_data": (SourceConfig(b),)}),
        )
    )
    assert both["eval_loss_end"] == one["eval_loss_end"]
    assert both["selection_loss"] == other["eval_loss_end"] != both["eval_loss_end"]
    assert "selection_loss" not in one
    metrics = (tmp_path / "both/run/metrics.jsonl").read_text().splitlines()
    assert both["selection_loss"] not in [json.loads(line)["loss"] for line in metrics]  # not on the curve


# --- which documents are held back

TOKENIZER = byte_tokenizer()


def prepared(config):
    return prepare_data(config, TOKENIZER, progress=False)


def decoded(dataset) -> list[str]:
    return [TOKENIZER.decode(item["input_ids"].tolist()) for item in dataset]


@pytest.mark.parametrize("unusable", ["empty", "dropped"])
def test_a_document_without_blocks_is_not_held_back(unusable, tmp_path):
    """Where the hash picks none, the one it comes closest to may be empty or too long; where it is not, it is taken."""
    texts = [f"document {n}, " * 9 for n in range(8)]
    closest = sorted(range(1, 8), key=hold_out_score)
    held = {}
    for bad in (None, closest[0]):
        if unusable == "empty":
            rows = [{"text": "" if n == bad else text} for n, text in enumerate(texts)]
        else:
            rows = [conversation(text * (50 if n == bad else 1), text) for n, text in enumerate(texts)]
        path = write_jsonl(tmp_path / f"{bad}.jsonl", rows)
        data = prepared(run_config(path, cache=tmp_path, eval_fraction=0.001, max_length=400, truncation="drop"))
        assert data.statistics.held_out_documents == 1
        assert not any("too few documents" in note for note in data.statistics.notes)
        held[bad] = set(re.findall("document .", "".join(decoded(data.evaluation))))
    assert held == {None: {f"document {closest[0]}"}, closest[0]: {f"document {closest[1]}"}}


def test_where_no_other_document_has_blocks(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 500}, {"text": ""}, {"text": "  "}])
    data = prepared(run_config(path, cache=tmp_path, eval_fraction=0.001, max_length=64))
    assert any("too few documents" in note for note in data.statistics.notes)
    long = conversation("x" * 500, "y")
    path = write_jsonl(tmp_path / "b.jsonl", [conversation("x" * 40, "y" * 20), long, long])
    data = prepared(run_config(path, cache=tmp_path, eval_fraction=0.001, max_length=128, truncation="drop"))
    assert any("nothing is held back" in note for note in data.statistics.notes)
    assert data.statistics.held_out_documents == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_that_are_not_evaluated_are_said(streaming, tmp_path):
    path = write_texts(tmp_path / "t.jsonl")
    held = []
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 400)
        held.append(SourceConfig(str(tmp_path / f"{name}.txt")))
    settings = {"cache": tmp_path, "max_length": 40, "streaming": streaming, "max_steps": 5, "eval_data": tuple(held)}
    for blocks, sources in ((2, "ab"), (1, "a"), (9, "abc")):
        data = prepared(run_config(path, eval_max_blocks=blocks, method="full", **settings))
        assert {text[0] for text in decoded(data.evaluation)} == set(sources)
        said = [note for note in data.statistics.notes if "eval_max_blocks is small" in note]
        assert len(said) == (len(sources) < 3)
        assert all(
            f"nothing of {held[blocks].path}{' and 1 more' * (blocks == 1)} is evaluated" in note for note in said
        )
