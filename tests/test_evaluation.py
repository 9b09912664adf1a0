"""Perplexity against a plain loop of our own, for what the harness counts and for what it must leave alone."""

import hashlib
import json
import logging
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from graftlm.errors import UserError
from graftlm.evaluation import perplexity
from graftlm.evaluation.harness import harness_model
from graftlm.evaluation.perplexity import evaluate_perplexity
from graftlm.evaluation.run import run_evaluation
from graftlm.models import load_model, load_tokenizer

TEXTS = ["It was a dark and stormy night; " * 9 + "the end.", "Short one.", "  Zwölf Boxkämpfer jagen\n\nViktor. "]
CONTEXT = 40


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-llama")


@pytest.fixture
def model():
    model = load_model("tiny-llama")
    with torch.no_grad():  # sharper than at random, so that a token scored in the wrong context shows
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def slow_nats(model, ids: list[int], start: int, context: int) -> float:
    """-log p of `ids`: windows of `context` tokens, each seeing `start` or the token before it, one pass a window."""
    total = 0.0
    for begin in range(0, len(ids), context):
        window = ids[begin : begin + context]
        # The harness keeps the last, shorter window full by feeding it tokens that were already scored.
        fed = [start, *ids][max(0, begin + len(window) - context) if begin else 0 : begin + len(window)]
        with torch.no_grad():
            logits = model(torch.tensor([fed])).logits[0].double()
        scored = logits.log_softmax(-1)[-len(window) :]
        total -= scored[torch.arange(len(window)), torch.tensor(window)].sum().item()
    return total


def test_equals_a_plain_loop_over_windows(model, tokenizer, texts):
    result = evaluate_perplexity(model, tokenizer, texts, max_length=CONTEXT, progress=False)
    encoded = [tokenizer.encode(text) for text in TEXTS]
    assert len(encoded[0]) > 3 * CONTEXT
    nats = sum(slow_nats(model, ids, tokenizer.eos_token_id, CONTEXT) for ids in encoded)
    tokens = sum(len(ids) for ids in encoded)
    words = sum(len(text.split(" ")) for text in TEXTS[:2]) + len(["", "Zwölf", "Boxkämpfer", "jagen", "Viktor.", ""])
    assert (result["tokens"], result["words"], result["documents"]) == (tokens, words, 3)
    assert result["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert result["token_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert result["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batch_size_does_not_matter(model, tokenizer, texts, batch_size):
    one = evaluate_perplexity(model, tokenizer, texts, max_length=CONTEXT, progress=False)
    many = evaluate_perplexity(model, tokenizer, texts, max_length=CONTEXT, batch_size=batch_size, progress=False)
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_every_kind_of_file_gives_the_same(model, tokenizer, texts, tmp_path):
    expected = evaluate_perplexity(model, tokenizer, texts, limit=1, max_length=CONTEXT, progress=False)
    assert expected["documents"] == 1
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "t.parquet")
    (tmp_path / "t.txt").write_text(TEXTS[0])
    for name, limit in (("t.parquet", 1), ("t.txt", None)):
        result = evaluate_perplexity(model, tokenizer, tmp_path / name, limit=limit, max_length=CONTEXT, progress=False)
        assert result == expected


def test_half_of_a_character_is_said(model, tokenizer, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "good"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(UserError, match=r"t\.jsonl:2: '\\ud83d' is half of a character"):
        evaluate_perplexity(model, tokenizer, tmp_path / "t.jsonl", max_length=CONTEXT, progress=False)


def test_long_document_arrives_whole(model, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text(TEXTS[0])
    whole = evaluate_perplexity(model, tokenizer, tmp_path / "t.txt", max_length=CONTEXT, progress=False)
    monkeypatch.setattr("graftlm.training.data.readers.PIECE_CHARACTERS", 50)
    monkeypatch.setattr("graftlm.training.data.readers.pieces.__defaults__", (50,))
    assert evaluate_perplexity(model, tokenizer, tmp_path / "t.txt", max_length=CONTEXT, progress=False) == whole


def test_special_tokens_of_the_tokenizer_are_not_scored(model, tokenizer, texts):
    adding = load_tokenizer("tiny-llama")
    from tokenizers.processors import TemplateProcessing

    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single=f"{end[0]} $A {end[0]}", special_tokens=[end])
    assert adding.encode("a") == [end[1], *tokenizer.encode("a"), end[1]]
    results = [evaluate_perplexity(model, t, texts, max_length=CONTEXT, progress=False) for t in (tokenizer, adding)]
    assert results[0] == results[1]


def test_model_and_tokenizer_are_left_as_they_were(model, texts, caplog, recwarn):
    tokenizer = load_tokenizer("tiny-llama")
    tokenizer.pad_token = None
    size = len(tokenizer)
    model.train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    evaluate_perplexity(model, tokenizer, texts, limit=2, max_length=CONTEXT, progress=False)
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        assert parameter is weights[name][0]
        assert torch.equal(parameter, weights[name][1])
        assert parameter.requires_grad
        assert parameter.grad is None
    assert (tokenizer.pad_token, len(tokenizer)) == (None, size)
    assert not caplog.records
    assert logging.getLogger("lm_eval").level != logging.ERROR


def test_dropout_is_off_while_a_training_model_is_evaluated(model, tokenizer, texts):
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    expected = evaluate_perplexity(model, tokenizer, texts, limit=1, max_length=CONTEXT, progress=False)
    model.train()
    assert evaluate_perplexity(model, tokenizer, texts, limit=1, max_length=CONTEXT, progress=False) == expected


def test_sixteen_bit_model_is_summed_in_thirty_two(tokenizer, texts):
    model = load_model("tiny-llama", dtype="bfloat16")
    result = evaluate_perplexity(model, tokenizer, texts, max_length=CONTEXT, progress=False)
    nats = sum(slow_nats(model, tokenizer.encode(text), tokenizer.eos_token_id, CONTEXT) for text in TEXTS)
    assert result["loss"] == pytest.approx(nats / result["tokens"], rel=1e-5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_progress_counts_every_token_in_one_bar(model, tokenizer, texts, capsys):
    result = evaluate_perplexity(model, tokenizer, texts, max_length=CONTEXT)
    shown = capsys.readouterr().err
    assert f"{result['tokens']}/{result['tokens']}" in shown
    assert "Running loglikelihood" not in shown


def test_wrapped_model_does_the_harness_other_requests_too(model, tokenizer):
    from lm_eval.api.instance import Instance

    request = Instance(request_type="loglikelihood", doc={}, arguments=("The cat", " sat"), idx=0)
    with harness_model(model, tokenizer) as lm:
        ((score, _),) = lm.loglikelihood([request], disable_tqdm=True)
    prompt, answer = tokenizer.encode("The cat"), tokenizer.encode(" sat")
    with torch.no_grad():
        logs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    expected = sum(logs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
    assert score == pytest.approx(expected, rel=1e-5)


def test_context_is_the_model_s_unless_its_logits_are_too_large(model, tokenizer, texts, monkeypatch, caplog):
    assert evaluate_perplexity(model, tokenizer, texts, limit=1, progress=False)["max_length"] == 2048
    monkeypatch.setattr(perplexity, "LOGITS_AT_MOST", 4 * model.config.vocab_size * 100)
    assert evaluate_perplexity(model, tokenizer, texts, limit=1, progress=False)["max_length"] == 100
    assert "max_length: 100 tokens" in caplog.text


@pytest.mark.parametrize("max_length", [0, 2049])
def test_context_beyond_the_model_s(model, tokenizer, texts, max_length):
    with pytest.raises(UserError, match=f"max_length: {max_length}"):
        evaluate_perplexity(model, tokenizer, texts, max_length=max_length)


def test_files_that_cannot_be_scored(model, tokenizer, tmp_path):
    empty, column, torn = tmp_path / "empty.txt", tmp_path / "column.jsonl", tmp_path / "torn.jsonl"
    empty.write_text("")
    column.write_text('{"text": "good"}\n{"words": "bad"}\n')
    torn.write_text('{"text": "good"}\n{"text": \n')
    for path, words in ((empty, "no token"), (column, "column.jsonl:2.*column text"), (torn, "torn.jsonl:2")):
        with pytest.raises(UserError, match=words):
            evaluate_perplexity(model, tokenizer, path, max_length=CONTEXT, progress=False)
    with pytest.raises(UserError, match="no such file"):
        run_evaluation("tiny-llama", tmp_path / "out.json", perplexity=[tmp_path / "none.txt"])


def test_model_that_gives_nan(model, tokenizer, texts):
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="log-likelihood is nan"):
        evaluate_perplexity(model, tokenizer, texts, max_length=CONTEXT, progress=False)


def test_text_without_spaces_has_no_word_perplexity(model, tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("語" * 300)
    result = evaluate_perplexity(model, tokenizer, tmp_path / "t.txt", max_length=CONTEXT, progress=False)
    assert result["word_perplexity"] is None
    assert math.isfinite(result["token_perplexity"])


def test_verb_writes_what_it_returns(tmp_path, texts):
    out = tmp_path / "deep" / "out.json"
    result = run_evaluation("tiny-llama", out, perplexity=[texts], limit=2, max_length=CONTEXT, progress=False)
    assert json.loads(out.read_text()) == result
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]
    name = f"perplexity:{texts}"
    digest = hashlib.sha256(texts.read_bytes()).hexdigest()
    assert (result["model"], result["data"][name]) == ("tiny-llama", {"texts.jsonl": digest})
    expected = evaluate_perplexity(
        load_model("tiny-llama"), load_tokenizer("tiny-llama"), texts, limit=2, max_length=CONTEXT, progress=False
    )
    assert (result["results"][name]["n"], result["results"][name]["loss"]) == (2, expected["loss"])
