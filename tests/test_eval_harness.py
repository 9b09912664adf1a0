"""`graftlm eval` against lm-evaluation-harness itself on the same model and data, and what we add: resuming, files."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from eval_data import choice, science, write, write_folder
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from graftlm.errors import UserError
from graftlm.evaluation.evaluate import evaluate_tasks, prepare_multiple_choice
from graftlm.evaluation.request_cache import RequestCache
from graftlm.evaluation.run import _settings_fingerprint, model_fingerprint, run_evaluation
from graftlm.evaluation.tasks import choose_questions, leaves, parse_tasks, prepare_tasks, stock_manager, write_task
from graftlm.files import locked
from graftlm.models import load_model, load_tokenizer, save_model


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    for name in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(name, True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model():
    model = load_model("tiny-llama")
    with torch.no_grad():  # sharper than at random: answers differ
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-llama")


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(model, tokenizer, folder)
    return folder


def plain(metrics: dict) -> dict:
    """The harness's numbers under our names, for tasks that read answers in one way."""
    return {key.partition(",")[0]: None if v == "N/A" else v for key, v in metrics.items() if "," in key}


def compare(mine: dict, theirs: dict, metrics: int) -> None:
    """Exactly equal, standard errors and all."""
    expected = plain(theirs)
    assert len(expected) == 2 * metrics
    assert {name: mine[name] for name in expected} == expected
    assert mine["n"] == theirs["sample_len"]


def test_equals_the_harness_on_data_of_its_own_schema(model, tokenizer, saved, data, tmp_path):
    """Theirs: rows written by hand as the Hub has them, read by `datasets`, the model opened by the harness."""
    _, stock = stock_manager(["arc_easy", "winogrande"])
    (tmp_path / "tasks").mkdir()

    def hub(name: str, split: str, rows: list) -> None:
        file = write(tmp_path, f"{name}.jsonl", rows)
        files = {split: str(file), "train": str(write(tmp_path, f"{name}-train.jsonl", rows[::-1]))}
        kwargs = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
        config = {"include": str(stock[name].yaml_path), "task": name, "tag": None, "dataset_path": "json"}
        config |= {"dataset_name": None, "dataset_kwargs": kwargs, "num_fewshot": 2 if name == "arc_easy" else 0}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(config))

    local = science(9)
    write(tmp_path, "data/arc_easy/test.jsonl", local)
    write(tmp_path, "data/arc_easy/train.jsonl", local[::-1])
    choices = [{"text": row["choices"], "label": list("ABCD")} for row in local]
    rows = [
        {"question": row["question"], "choices": several, "answerKey": "ABCD"[row["answer"]]}
        for row, several in zip(local, choices, strict=True)
    ]
    hub("arc_easy", "test", rows)
    blanks = [choice(f"Ann saw Bob {i} times and _ ran to {i}.", "Ann", "Bob", answer=i % 2) for i in range(6)]
    write(tmp_path, "data/winogrande/test.jsonl", blanks)
    rows = [
        {"sentence": r["question"], "option1": "Ann", "option2": "Bob", "answer": f"{r['answer'] + 1}"} for r in blanks
    ]
    hub("winogrande", "validation", rows)

    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(saved), "dtype": "float32"},
        batch_size=3,
        device="cpu",
        tasks=["arc_easy", "winogrande"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )
    names = ["arc_easy:2", "winogrande"]
    mine = evaluate_tasks(model, tokenizer, names, data_dir=tmp_path / "data", batch_size=3, progress=False)
    compare(mine["results"]["arc_easy"], theirs["results"]["arc_easy"], 2)
    compare(mine["results"]["winogrande"], theirs["results"]["winogrande"], 1)
    assert mine["results"]["arc_easy"]["shots"] == theirs["n-shot"]["arc_easy"] == 2
    assert 0 < mine["results"]["arc_easy"]["acc"] < 1


def test_equals_the_harness_on_every_kind_of_task(model, tokenizer, saved, data, tmp_path):
    """Text written, words scored, articles scored, a limit, a group: theirs from the same files."""
    names = ["gsm8k_cot", "lambada_openai", "wikitext", "arc_easy", "mmlu_anatomy"]
    _, stock = stock_manager(names)
    for name in names:
        write_task(tmp_path, name, stock[name], data_dir=data, shots=1 if name == "gsm8k_cot" else None)
    samples = choose_questions({"mmlu_anatomy": 8}, 5, 1234) | choose_questions({"arc_easy": 9}, 5, 1234)
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(saved), "dtype": "float32"},
        batch_size=2,
        device="cpu",
        tasks=names,
        samples=samples,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    asked = ["gsm8k_cot:1", *names[1:]]
    mine = evaluate_tasks(
        model, tokenizer, asked, data_dir=data, limit=5, batch_size=2, log_samples=True, progress=False
    )
    for name, metrics in (("lambada_openai", 2), ("wikitext", 3), ("arc_easy", 2), ("mmlu_anatomy", 1)):
        compare(mine["results"][name], theirs["results"][name], metrics)
    assert mine["results"]["arc_easy"]["n"] == 5
    # The random model solves nothing: what it wrote says whether prompt, stops and length are theirs.
    written = {one["resps"][0][0] for one in theirs["samples"]["gsm8k_cot"]}
    assert {answer for one in mine["samples"]["gsm8k_cot"] for answer in one["answers"]} == written != {""}
    math, expected = mine["results"]["gsm8k_cot"], theirs["results"]["gsm8k_cot"]
    assert math["exact_match:strict-match"] == expected["exact_match,strict-match"]
    assert math["exact_match:flexible-extract"] == expected["exact_match,flexible-extract"]
    assert (math["n"], math["shots"], math["exact_match:strict-match_stderr"]) == (1, 1, None)
    assert mine["results"]["lambada_openai"]["main_metric"] == "acc"
    assert mine["results"]["wikitext"]["main_metric"] == "word_perplexity"


@pytest.mark.slow
def test_equals_the_harness_command_line(model, tokenizer, saved, data, tmp_path):
    _, stock = stock_manager(["arc_easy"])
    (tmp_path / "tasks").mkdir()
    write_task(tmp_path / "tasks", "arc_easy", stock["arc_easy"], data_dir=data)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "arc_easy", "--device", "cpu"]
    command += ["--model_args", f"pretrained={saved},dtype=float32", "--include_path", str(tmp_path / "tasks")]
    command += ["--batch_size", "2", "--output_path", str(tmp_path / "theirs")]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True)
    (written,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]["arc_easy"]
    out = tmp_path / "mine.json"
    run_evaluation(str(saved), out, tasks=["arc_easy"], data_dir=data, batch_size=2, progress=False)
    compare(json.loads(out.read_text())["results"]["arc_easy"], theirs, 2)


def test_group_s_numbers_and_those_of_its_tasks(model, tokenizer, tmp_path):
    _, stock = stock_manager(["mmlu_stem"])
    subjects = [leaf.removeprefix("mmlu_") for leaf in leaves(stock, "mmlu_stem")]
    rows = [choice(f"{s} {i}", *"wxyz", answer=i % 4, subject=s) for s in subjects for i in range(6)]
    write(tmp_path, "mmlu/test.jsonl", rows)
    report = evaluate_tasks(
        model, tokenizer, ["mmlu_stem"], data_dir=tmp_path, limit=60, batch_size=8, log_samples=True, progress=False
    )
    parts = report["subtasks"]["mmlu_stem"]
    assert set(parts) == {f"mmlu_{s}" for s in subjects}
    whole = report["results"]["mmlu_stem"]
    assert whole["n"] == sum(part["n"] for part in parts.values()) == 60
    assert (whole["shots"], report["notes"]) == (0, {})
    assert whole["acc"] == pytest.approx(sum(part["acc"] * part["n"] for part in parts.values()) / 60)
    assert whole["acc_stderr"] > 0
    assert {len(report["samples"][name]) for name in parts} == {part["n"] for part in parts.values()}


def test_group_gets_two_questions_a_task_at_least(tmp_path):
    _, stock = stock_manager(["mmlu_stem"])
    subjects = [leaf.removeprefix("mmlu_") for leaf in leaves(stock, "mmlu_stem")]
    write(tmp_path, "mmlu/test.jsonl", [choice(f"{s} {i}", *"wxyz", subject=s) for s in subjects for i in range(6)])
    prepared = prepare_tasks(parse_tasks(["mmlu_stem"]), data_dir=tmp_path, limit=3)
    count = 2 * len(subjects)
    assert sum(map(len, prepared.chosen.values())) == count
    assert prepared.notes["mmlu_stem"] == [f"{count} questions, not 3: 2 at least of each of its {len(subjects)} tasks"]


def test_samples_are_kept_in_the_order_of_the_data(model, tokenizer, data):
    report = evaluate_tasks(model, tokenizer, ["arc_easy"], data_dir=data, limit=5, log_samples=True, progress=False)
    samples = report["samples"]["arc_easy"]
    assert [one["id"] for one in samples] == choose_questions({"arc_easy": 9}, 5, 1234)["arc_easy"]
    assert sum(one["acc"] for one in samples) / 5 == report["results"]["arc_easy"]["acc"]
    for one in samples:
        likeliest = max(range(4), key=lambda i, one=one: one["answers"][i][0])
        assert one["acc"] == float(likeliest == one["id"] % 4)
    json.dumps(report)


def test_own_questions(model, tokenizer, tmp_path):
    rows = [
        choice("Who?", "I", "you", answer=1),
        choice("Where?", "here", "far away", "up", passage="Look up.", answer=2),
    ]
    file = write(tmp_path, "own.jsonl", rows)
    prepared = prepare_multiple_choice(file, "own")
    report = evaluate_tasks(model, tokenizer, prepared, log_samples=True, progress=False)
    prompts = ["Question: Who?\nAnswer:", "Look up.\nQuestion: Where?\nAnswer:"]
    right = {"acc": 0, "acc_norm": 0}
    for row, prompt, sample in zip(rows, prompts, report["samples"]["own"], strict=True):
        scores = [score(model, tokenizer, prompt, f" {one}") for one in row["choices"]]
        assert [answer[0] for answer in sample["answers"]] == pytest.approx(scores, rel=1e-4)
        norm = [value / len(one) for value, one in zip(scores, row["choices"], strict=True)]
        right["acc"] += scores.index(max(scores)) == row["answer"]
        right["acc_norm"] += norm.index(max(norm)) == row["answer"]
    result = report["results"]["own"]
    assert (result["acc"], result["acc_norm"], result["n"]) == (right["acc"] / 2, right["acc_norm"] / 2, 2)
    assert result["acc_stderr"] is not None


def score(model, tokenizer, prompt, continuation):
    ids, start = tokenizer.encode(prompt + continuation), len(tokenizer.encode(prompt))
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logs[i - 1, ids[i]].item() for i in range(start, len(ids)))


def test_own_questions_with_wrong_fields(tmp_path):
    file = write(tmp_path, "own.jsonl", [choice("a", "b", "c"), choice("a", "b", "c", passage=3)])
    with pytest.raises(UserError, match=r"own.jsonl:2: passage: 3 is no text"):
        prepare_multiple_choice(file, "own")
    with pytest.raises(UserError, match="no rows"):
        prepare_multiple_choice(write(tmp_path, "none.jsonl", []), "own")


def test_a_context_that_is_too_short_or_too_long(model, tokenizer, data):
    writing = prepare_tasks(parse_tasks(["gsm8k_cot:0"]), data_dir=data)
    with pytest.raises(UserError, match="gsm8k_cot: writes up to 256 tokens, and the context has 200"):
        evaluate_tasks(model, tokenizer, writing, max_length=200, progress=False)
    choosing = prepare_tasks(parse_tasks(["arc_easy"]), data_dir=data)
    context = model.config.max_position_embeddings
    with pytest.raises(UserError, match=f"max_length: {context + 1} is above the model's context of {context} tokens"):
        evaluate_tasks(model, tokenizer, choosing, max_length=context + 1, progress=False)


def test_prompts_that_are_cut_are_counted(model, tokenizer, tmp_path):
    long = " ".join(f"word{i}" for i in range(40))
    rows = [choice(long if i % 3 == 0 else "Who?", "us", "we") for i in range(9)]
    prepared = prepare_multiple_choice(write(tmp_path, "own.jsonl", rows), "own")
    longest = len(tokenizer.encode(f"Question: {long}\nAnswer: us"))
    report = evaluate_tasks(model, tokenizer, prepared, max_length=longest - 2, progress=False)
    (note,) = report["notes"]["own"]
    assert note.startswith(f"6 of 18 prompts are longer than the context ({longest - 2} tokens")
    whole = evaluate_tasks(model, tokenizer, prepared, max_length=longest - 1, progress=False)
    assert whole["notes"] == {}
    rows = [choice("Who?", "I", long)]
    prepared = prepare_multiple_choice(write(tmp_path, "own.jsonl", rows), "own")
    with pytest.raises(UserError, match="own: a choice is longer than the context of 20 tokens"):
        evaluate_tasks(model, tokenizer, prepared, max_length=20, progress=False)


def test_prompts_of_texts_to_be_written_are_counted_as_the_harness_cuts_them(model, tokenizer, data):
    fits = max(
        len(tokenizer.encode(request.args[0]))
        for request in requests_of(prepare_tasks(parse_tasks(["gsm8k_cot:1"]), data_dir=data))
    )
    for room, notes in ((fits, {}), (fits - 1, {"gsm8k_cot"})):
        prepared = prepare_tasks(parse_tasks(["gsm8k_cot:1"]), data_dir=data)
        report = evaluate_tasks(model, tokenizer, prepared, max_length=256 + room, progress=False)
        assert set(report["notes"]) == set(notes)


def requests_of(prepared):
    (task,) = prepared.built["gsm8k_cot"]
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return task.instances


def test_shots_of_a_group_are_those_that_were_asked_for(data, monkeypatch):
    """A group may set its tasks' shots itself: what was asked for wins, but for tasks that are defined with none."""
    asked = parse_tasks(["arc_easy:2"])
    load = TaskManager.load
    for told, expected in ((25, 2), (0, 0)):

        def inline(self, names, told=told):
            loaded = load(self, names)
            for task in loaded["tasks"].values():
                task.set_config("num_fewshot", told)
            return loaded

        monkeypatch.setattr(TaskManager, "load", inline)
        (task,) = prepare_tasks(asked, data_dir=data).built["arc_easy"]
        assert task.get_config("num_fewshot") == expected


def test_tasks_that_shuffle_as_they_are_loaded_do_it_as_the_harness_does(data, monkeypatch):
    load, drawn = TaskManager.load, []

    def noted(self, names):
        drawn.append((random.random(), float(np.random.rand()), torch.rand(()).item()))
        return load(self, names)

    monkeypatch.setattr(TaskManager, "load", noted)
    for _ in range(2):
        prepare_tasks(parse_tasks(["arc_easy"]), data_dir=data)
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    assert set(drawn) == {(random.random(), float(np.random.rand()), torch.rand(()).item())}


# --- going on --------------------------------------------------------------------------------------------------------

WORK = ["arc_easy", "gsm8k_cot:1", "wikitext"]


def interrupted(monkeypatch, after: int) -> list[int]:
    """Let the model be killed at its pass number `after`; the list counts the passes."""
    passes = [0]
    for name in ("_model_call", "_model_generate"):
        original = getattr(HFLM, name)

        def counted(self, *args, original=original, **kwargs):
            passes[0] += 1
            if passes[0] == after:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        monkeypatch.setattr(HFLM, name, counted)
    return passes


@pytest.mark.parametrize("after", [3, 9])
def test_killed_evaluation_goes_on_to_the_same_numbers(model, saved, data, tmp_path, monkeypatch, after):
    settings = {"tasks": WORK, "data_dir": data, "batch_size": 4, "log_samples": True, "progress": False}
    settings |= {"max_length": 400}
    with monkeypatch.context() as context:
        passes = interrupted(context, after=-1)
        whole = run_evaluation(str(saved), tmp_path / "whole.json", **settings)
    assert passes[0] >= after
    out = tmp_path / "out.json"
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupted(context, after)
        run_evaluation(str(saved), out, **settings)
    kept = out.with_name("out.json.answers.jsonl")
    assert len(kept.read_text().splitlines()) > 1
    assert not out.exists()
    kept.write_bytes(kept.read_bytes() + b'["torn in the mid')
    with monkeypatch.context() as context:
        again = interrupted(context, after=-1)
        resumed = run_evaluation(str(saved), out, **settings)
    assert again[0] == passes[0] - (after - 1)
    assert {**resumed, "date": 0, "seconds": 0} == {**whole, "date": 0, "seconds": 0}
    assert not kept.exists()
    assert json.loads(out.read_text()) == resumed


def test_another_model_does_not_get_kept_answers(model, saved, data, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    settings = {"tasks": ["arc_easy"], "data_dir": data, "progress": False}
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupted(context, 9)
        run_evaluation(str(saved), out, **settings)
    assert len(out.with_name("out.json.answers.jsonl").read_text().splitlines()) == 9
    other = run_evaluation("tiny-llama", out, **settings)
    assert other["results"] == run_evaluation("tiny-llama", tmp_path / "fresh.json", **settings)["results"]


def test_a_place_that_cannot_be_written_is_said_first(tmp_path):
    (tmp_path / "file").write_text("")
    for out, says in [(tmp_path, "is a folder; name a file in it"), (tmp_path / "file" / "o.json", "cannot write")]:
        with pytest.raises(UserError, match=says):
            run_evaluation("no/such/model", out, tasks=["arc_easy"])


def test_two_evaluations_do_not_write_the_same_file(saved, data, tmp_path):
    out = tmp_path / "out.json"
    with locked(tmp_path, ".out.json.lock"), pytest.raises(UserError, match=r"another evaluation is writing out\.json"):
        run_evaluation(str(saved), out, tasks=["arc_easy"], data_dir=data, progress=False)
    run_evaluation(str(saved), out, tasks=["arc_easy"], data_dir=data, limit=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_what_goes_wrong_while_measuring_is_no_full_disk(saved, data, tmp_path, monkeypatch):
    def lost(*_args, **_kwargs):
        raise ConnectionError("the Hub is gone")

    monkeypatch.setattr("graftlm.evaluation.run.evaluate_tasks", lost)
    with pytest.raises(ConnectionError, match="the Hub is gone"):
        run_evaluation(str(saved), tmp_path / "out.json", tasks=["arc_easy"], data_dir=data, progress=False)
    assert not list(tmp_path.iterdir())


def test_answers_of_a_model_with_another_config_are_not_taken(saved):
    one, other = load_model(str(saved)), load_model(str(saved))
    assert _settings_fingerprint(one) == _settings_fingerprint(other)
    other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 1e6}
    assert _settings_fingerprint(one) != _settings_fingerprint(other)


def test_a_refused_evaluation_leaves_nothing(data, tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="above the model's"):
        run_evaluation("tiny-llama", tmp_path / "new/o.json", tasks=["arc_easy"], data_dir=data, max_length=10**6)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.slow
def test_killed_process_goes_on(saved, data, tmp_path):
    out = tmp_path / "out.json"
    words = ["eval", str(saved), "--tasks", "arc_easy,gsm8k_cot:1", "--data-dir", str(data), "--out", str(out)]
    command = [sys.executable, "-m", "graftlm", *words]
    kept = out.with_name("out.json.answers.jsonl")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (kept.exists() and kept.read_bytes().count(b"\n") > 5) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, check=True)
    fresh = run_evaluation(
        str(saved), tmp_path / "fresh.json", tasks=words[3].split(","), data_dir=data, progress=False
    )
    assert json.loads(out.read_text())["results"] == fresh["results"]


def test_cache_gives_sampled_answers_once_each(tmp_path):
    sampled = ("prompt", {"do_sample": True})
    cache = RequestCache(tmp_path / "c.jsonl", {"model": "a"})
    for text in ("one", "two"):
        cache.add("generate_until", sampled, text)
    cache.add("loglikelihood", ("a", "b"), [-1.5, True])
    cache.flush()
    cache = RequestCache(tmp_path / "c.jsonl", {"model": "a"})
    assert len(cache) == 3
    assert [cache.take("generate_until", sampled) for _ in range(3)] == ["one", "two", None]
    assert [cache.take("loglikelihood", ("a", "b")) for _ in range(2)] == [[-1.5, True]] * 2
    assert cache.take("loglikelihood", ("a", "c")) is None
    other = RequestCache(tmp_path / "c.jsonl", {"model": "b"})
    assert len(other) == 0
    other.add("loglikelihood", ("a", "b"), [-1.5, True])
    other.flush()
    assert len(RequestCache(tmp_path / "c.jsonl", {"model": "b"})) == 1
    assert len(RequestCache(tmp_path / "c.jsonl", {"model": "a"})) == 0  # thrown away by the other model


def test_fingerprint_sees_every_bit(model):
    before = model_fingerprint(model)
    assert model_fingerprint(model) == before
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        kept = weight[0, 0].item()
        weight[0, 0] = kept + 1e-6
        assert model_fingerprint(model) != before
        weight[0, 0] = kept
    assert model_fingerprint(model) == before


# --- the rest --------------------------------------------------------------------------------------------------------


def test_one_file_for_everything(saved, data, tmp_path):
    questions = write(tmp_path, "q.jsonl", [choice("a", "b", "c")] * 3)
    text = tmp_path / "t.txt"
    text.write_text("Some text.")
    out = tmp_path / "deep" / "out.json"
    settings = {"tasks": ["piqa"], "multiple_choice": [questions], "perplexity": [text], "data_dir": data}
    result = run_evaluation(str(saved), out, **settings, limit=2, progress=False)
    assert result == json.loads(out.read_text())
    names = ["piqa", f"multiple_choice:{questions}", f"perplexity:{text}"]
    assert list(result["results"]) == list(result["data"]) == names
    assert [result["results"][name]["n"] for name in names] == [2, 2, 1]
    assert (result["lm_eval"], result["limit"], result["seed"]) == ("0.4.13", 2, 1234)
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]


def test_progress_is_one_bar_and_nothing_else(model, tokenizer, data, capfd):
    evaluate_tasks(model, tokenizer, ["arc_easy", "lambada"], data_dir=data, batch_size=4)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "39/39" in shown.err  # nine questions of four choices, and three words
    last = shown.err.replace("\r", "\n").strip().splitlines()
    assert all("loglikelihood" in line for line in last if line.strip()), shown.err
    evaluate_tasks(model, tokenizer, ["piqa"], data_dir=data, progress=False)
    assert capfd.readouterr().err == ""


def test_nan(tokenizer, data):
    model = load_model("tiny-llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="log-likelihood is nan"):
        evaluate_tasks(model, tokenizer, ["piqa"], data_dir=data, progress=False)


def test_context_too_short_for_what_is_to_be_written(model, tokenizer, data):
    with pytest.raises(UserError, match=r"bbh_cot_fewshot_boolean_expressions: writes up to 1024 tokens.* has 512"):
        evaluate_tasks(
            model, tokenizer, ["bbh_cot_fewshot_boolean_expressions"], data_dir=data, max_length=512, progress=False
        )


def test_nothing_asked_for(tmp_path):
    with pytest.raises(UserError, match="nothing to measure"):
        run_evaluation("tiny-llama", tmp_path / "o.json")


def test_prepared_tasks_can_be_used_twice(model, tokenizer, data):
    prepared = prepare_tasks(parse_tasks(["piqa", "mmlu_anatomy:2"]), data_dir=data)
    first = evaluate_tasks(model, tokenizer, prepared, progress=False)
    assert evaluate_tasks(model, tokenizer, prepared, progress=False)["results"] == first["results"]
