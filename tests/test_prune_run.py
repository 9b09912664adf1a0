"""`graftlm prune`: calibration from text, the folder that comes out, and what is said of bad input."""

import json
import random
import shlex

import pytest
import torch
from tiny_models import batches, tiny_model

from graftlm import cli
from graftlm.errors import UserError
from graftlm.models import load_model, load_tokenizer
from graftlm.pruning import run
from graftlm.pruning.calibration import calibration_from
from graftlm.pruning.notes import notes_on, unused
from graftlm.pruning.prune import count_parameters
from graftlm.pruning.prune import prune as prune_model
from graftlm.pruning.saving import save_pruned
from graftlm.pruning.settings import METHODS, PruneSettings
from graftlm.pruning.surgery import keep_components
from graftlm.pruning.ways import WAYS, calibration_in_words, sequences_seen
from graftlm.training.config import SourceConfig


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.jsonl"
    generator = random.Random(0)
    rows = ["".join(generator.choices("abcdefgh ", k=40 + 37 * i)) for i in range(30)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def calibration(text, **given):
    settings = PruneSettings(sparsity=0.2, **given)
    return calibration_from(load_tokenizer("tiny-llama"), settings, [SourceConfig(str(text))], progress=False)


def rows_of(batches) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}


def test_calibration_is_drawn_anew_each_iteration_by_seed(text):
    drawn = calibration(text, samples=12)
    first = rows_of(drawn(0))
    assert len(first) == 12 and {len(row) for row in first} == {64}
    assert first == rows_of(drawn(0)) == rows_of(calibration(text, samples=12)(0))
    assert first != rows_of(drawn(1)) and first != rows_of(calibration(text, samples=12, seed=1)(0))
    assert sum(len(batch["input_ids"]) for batch in drawn(0)) == 12
    assert all(batch["input_ids"].numel() <= 640 for batch in drawn(0))
    held = rows_of(drawn.held_out())
    assert held and not held & set().union(*(rows_of(drawn(i)) for i in range(200)))
    assert not drawn.notes


def test_conversations_calibrate_too(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "chats.jsonl"
    row = {"messages": [{"role": "user", "content": "why? " * 40}, {"role": "assistant", "content": "so."}]}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(20)))
    assert len(calibration(path).numbers) >= 10


def test_conversations_are_seen_to_their_end(tmp_path, monkeypatch):
    """All begin alike, as under one system prompt: the first 64 tokens of each would be one sequence."""
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "chats.jsonl"
    rows = []
    for i in range(20):
        said = [("system", "be kind " * 30), ("user", f"why {i}? "), ("assistant", f"so {i}. " * 40)]
        rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = calibration(path, samples=20)
    pieces = {load_tokenizer("tiny-llama").decode(row) for i in range(20) for row in rows_of(drawn(i))}
    assert len(pieces) > 40 and any("so 7. so 7." in piece for piece in pieces)


def test_large_data_is_not_read_whole(text, monkeypatch):
    monkeypatch.setattr("graftlm.pruning.calibration.POOL", 20)
    whole = calibration(text, samples=4)
    monkeypatch.setattr("graftlm.pruning.calibration.LARGE", 100)
    monkeypatch.setattr("graftlm.training.data.prepare.prepare_cached", lambda *_: pytest.fail("it is all read"))
    part = calibration(text, samples=4)
    assert "only the first 20 sequences are drawn from" in part.notes[0] and not whole.notes
    assert len(part.sequences) == 20 < len(whole.sequences)


def test_of_large_and_small_data_both_are_seen(text, tmp_path, monkeypatch):
    monkeypatch.setattr("graftlm.pruning.calibration.LARGE", 5_000)
    small = tmp_path / "small.jsonl"
    small.write_text(json.dumps({"text": "tiny " * 60}) + "\n")
    sources = [SourceConfig(str(small)), SourceConfig(str(text))]
    found = calibration_from(load_tokenizer("tiny-llama"), PruneSettings(sparsity=0.2), sources, progress=False)
    seen = [load_tokenizer("tiny-llama").decode(item["input_ids"]) for item in found.sequences]
    assert len(seen) > 50 and sum("tiny" in piece for piece in seen) in range(1, 9)


@pytest.mark.parametrize("streaming", (False, True))
def test_of_data_that_are_not_read_whole_each_source_has_the_share_of_its_weight(streaming, tmp_path, monkeypatch):
    monkeypatch.setattr("graftlm.pruning.calibration.LARGE", 100)
    monkeypatch.setattr("graftlm.pruning.calibration.POOL", 100)
    sources = []
    for word, weight in (("left", 9.0), ("right", 1.0)):
        path = tmp_path / f"{word}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{word} " * 100}) + "\n" for _ in range(60)))
        sources.append(SourceConfig(str(path), weight=weight))
    settings, tokenizer = PruneSettings(sparsity=0.2), load_tokenizer("tiny-llama")
    found = calibration_from(tokenizer, settings, sources, streaming=streaming, progress=False)
    said = [tokenizer.decode(item["input_ids"]) for item in found.sequences]
    assert (sum("left" in one for one in said), sum("right" in one for one in said)) == (90, 10)
    assert "only the first 100 sequences are drawn from" in found.notes[0]
    monkeypatch.setattr("graftlm.pruning.calibration.POOL_TOKENS", 64 * 30)
    few = calibration_from(tokenizer, settings, sources, streaming=streaming, progress=False)
    assert len(few.sequences) == 30 and "only the first 30 sequences" in few.notes[0]


def test_rows_are_read_as_a_run_reads_them(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "both.jsonl"
    said = [{"role": "user", "content": "hi " * 60}, {"role": "assistant", "content": "ho " * 60}]
    path.write_text("".join(json.dumps({"text": "long text " * 30, "messages": said}) + "\n" for _ in range(20)))
    tokenizer, settings = load_tokenizer("tiny-llama"), PruneSettings(sparsity=0.2)
    for task, word in (("cpt", "long text"), ("sft", "hi hi")):
        found = calibration_from(tokenizer, settings, [SourceConfig(str(path))], task=task, progress=False)
        assert any(word in tokenizer.decode(row) for row in rows_of(found(0)))
        assert not any("long text" in tokenizer.decode(row) for row in rows_of(found(0))) or task == "cpt"


def test_text_that_is_too_short_says_what_to_do(text):
    there = len(calibration(text, samples=1).numbers) + len(calibration(text, samples=1).held_back)
    with pytest.raises(UserError, match=f"text.jsonl: {there} sequences of 64 tokens.*needs 9999; give more") as caught:
        calibration(text, samples=9999)
    assert "\n" not in str(caught.value)
    assert not len(calibration(text, samples=there).held_back)  # all are needed, so none is held back


def test_without_data_it_is_the_demos_text_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path / "cache"))
    library = tmp_path / "library"
    library.mkdir()
    (library / "a.py").write_text("print('abcdefgh')\n" * 200)
    monkeypatch.setattr("graftlm.demo.sysconfig.get_path", lambda _: str(library))
    found = calibration_from(load_tokenizer("tiny-llama"), PruneSettings(sparsity=0.2), progress=False)
    assert "demo's text" in found.notes[0]


def prune(*words: str) -> int:
    return cli.main(["prune", "tiny-llama", *words])


def test_the_verb_writes_a_model_that_opens(text, tmp_path, capsys):
    out = tmp_path / "small"
    given = ("--data", str(text), "--out", str(out), "--iterations", "2", "--amplitude", "0.1")
    assert prune("--sparsity", "0.3", *given) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "s, on 20 sequences of 64 tokens (10 in each of 2 steps)" in said
    assert f"--uniform --method adapt --data {text} --out {out}-uniform iterations=2" in said
    model, original = load_model(str(out)), load_model("tiny-llama")
    summary = json.loads((out / "pruning.json").read_text())
    target = count_parameters(original) - 0.3 * sum(
        p.numel() for name, p in original.named_parameters() if "proj" in name
    )
    assert target - 3 * 64 < count_parameters(model) == summary["parameters"] <= target
    assert summary["settings"]["amplitude"] == 0.1 and summary["calibration_sequences"] == 20
    assert summary["held_out_loss"] > 0 and len(summary["layer_parameters"]) == 4
    assert load_tokenizer(str(out)).eos_token_id == load_tokenizer("tiny-llama").eos_token_id
    assert "a loss of" in (out / "README.md").read_text()
    assert cli.main(["prune", str(out), "--sparsity", "0.1", "--data", str(text), "--out", str(out)]) == 2
    assert "the model's own folder" in capsys.readouterr().err
    # An earlier pruned model is replaced; this time a stock one of the same size comes out, and needs no control.
    assert prune("--target-parameters", str(count_parameters(model)), *given, "--uniform") == 0
    assert type(load_model(str(out))).__name__ == "LlamaForCausalLM"
    assert count_parameters(load_model(str(out))) <= count_parameters(model)
    assert "uniform control" not in capsys.readouterr().out


def test_the_printed_control_of_a_preset_runs_and_gets_nothing_that_it_does_not_read(text, tmp_path, capsys):
    words = [
        "--preset",
        "at-once",
        "--sparsity",
        "0.3",
        "--data",
        str(text),
        "--out",
        str(tmp_path / "small"),
        "samples=4",
    ]
    assert cli.main(["prune", "tiny-llama", *words]) == 0
    command = capsys.readouterr().out.partition("uniform control: ")[2].splitlines()[0]
    assert cli.main(shlex.split(command)[1:]) == 0
    assert "without effect" not in capsys.readouterr().out
    control, adaptive = (
        json.loads((tmp_path / name / "pruning.json").read_text()) for name in ("small-uniform", "small")
    )
    assert control["parameters"] <= adaptive["parameters"] and len(set(map(str, control["shapes"]))) == 1
    same = ("samples", "iterations", "heads_by", "seed")
    assert all(control["settings"][name] == adaptive["settings"][name] for name in same)


def test_a_uniform_pruning_of_layers_that_differ_is_told_of_no_control(text, tmp_path, capsys):
    narrow = keep_components(load_model("tiny-llama"), {"layer0_channels": torch.arange(70)})
    model, out = tmp_path / "narrow", tmp_path / "small"
    save_pruned(narrow, load_tokenizer("tiny-llama"), model)
    words = ("--sparsity", "0.1", "--uniform", "--iterations", "1", "--data", str(text), "--out", str(out))
    assert cli.main(["prune", str(model), *words]) == 0
    said = capsys.readouterr().out
    assert "uniform control" not in said and "note: the layers that it was given differ" in said


def test_data_of_a_config_are_read_as_it_says(text, tmp_path, capsys):
    rows = [json.loads(line) for line in text.read_text().splitlines()]
    bodies = tmp_path / "bodies.jsonl"
    bodies.write_text("".join(json.dumps({"body": row["text"]}) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(f"model: elsewhere\ndata: {{path: {bodies}, text_field: body}}\n")
    words = ["--sparsity", "0.3", "--iterations", "2", "--out"]
    assert prune(*words, str(tmp_path / "one"), "--data", str(text)) == 0
    assert prune(*words, str(tmp_path / "two"), "--data", str(tmp_path / "run.yaml")) == 0
    assert f"--data {tmp_path}/run.yaml" in " ".join(capsys.readouterr().out.split())
    one, two = (load_model(str(tmp_path / name)).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    (tmp_path / "none.yaml").write_text("model: elsewhere\n")
    assert prune(*words, str(tmp_path / "three"), "--data", str(tmp_path / "none.yaml")) == 2
    assert f"{tmp_path}/none.yaml:1: data: no source given" in capsys.readouterr().err
    (tmp_path / "odd.yaml").write_text("data:\n  path: x\n  text_fild: body\n")
    assert prune(*words, str(tmp_path / "three"), "--data", str(tmp_path / "odd.yaml")) == 2
    assert "odd.yaml:3: unknown key 'data.text_fild' (did you mean data.text_field?)" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_bits(text, tmp_path):
    data, settings = [str(text)], PruneSettings(sparsity=0.3, iterations=2)
    states = [
        run.run_prune("tiny-llama", settings, data, tmp_path / name, progress=False).model.state_dict()
        for name in ("one", "two")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_folder_that_cannot_be_replaced_is_refused_at_once(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(run, "load_tokenizer", None)
    for out, says in ((".", "is the folder you are in"), ("/proc", "/proc: is a mount point")):
        assert prune("--sparsity", "0.3", "--data", str(text), "--out", out) == 2
        assert says in capsys.readouterr().err


def test_a_folder_that_is_no_pruned_model_stays(text, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert prune("--sparsity", "0.3", "--data", str(text), "--out", str(mine)) == 2
    assert "no pruned model" in capsys.readouterr().err
    assert prune("--sparsity", "0.3", "--data", str(text), "--out", str(mine / "thesis.txt")) == 2
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_what_lies_beside_a_pruned_model_stays(text, tmp_path, capsys):
    out = tmp_path / "small"
    given = ("--sparsity", "0.3", "--data", str(text), "--out", str(out))
    assert prune(*given) == 0 and prune(*given) == 0
    for name in ("small-q8_0.gguf", "eval.json", "notes.txt", "my_script.py"):
        (out / name).write_text("mine")
        assert prune(*given) == 2
        assert f"holds {name} beside a pruned model" in capsys.readouterr().err
        assert (out / name).read_text() == "mine"
        (out / name).unlink()


def test_what_cannot_be_is_said_before_anything_is_read(text, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    load_model("tiny-llama").save_pretrained(model)
    load_tokenizer("tiny-llama").save_pretrained(model)
    monkeypatch.setattr(run, "calibration_from", None)
    monkeypatch.setattr(run, "load_model", None)
    for words, says in [
        (("--sparsity", "0.99", "--out", str(tmp_path / "small")), "is more than can go"),
        (("--target-parameters", "1B", "--out", str(tmp_path / "small")), "is above the model's"),
        (("--sparsity", "0.3", "--sample-length", "4096", "--out", str(tmp_path / "small")), "context of 2048 tokens"),
        (("--sparsity", "0.3", "--out", "/proc/nowhere/small"), "/proc/nowhere"),
    ]:
        assert cli.main(["prune", str(model), "--data", str(text), *words]) == 2
        assert says in capsys.readouterr().err


def test_a_sliced_model_is_not_told_of_numbers_of_heads():
    """Its class is its own because of the rotations: no sparsity makes it stock."""
    model = tiny_model()
    pruned = prune_model(model, PruneSettings(method="slicegpt", sparsity=0.3), lambda _: batches(1, rows=4))
    assert not any("all layers are alike" in note for note in notes_on(pruned))


class Read(dict):
    """A batch that knows whether it was looked at."""

    seen = False

    def _look(self):
        self.seen = True
        return self

    def __getitem__(self, key):
        return dict.__getitem__(self._look(), key)

    def items(self):
        return dict.items(self._look())


WITHIN_LAYERS = [{"uniform": False}, {"heads_by": "loss", "samples": 24, "sample_length": 64}]


@pytest.mark.parametrize(
    "method, given",
    [(method, given) for method in METHODS for given in ({}, *(WITHIN_LAYERS if WAYS[method].iterations else ()))],
)
def test_what_a_method_says_to_have_seen_is_what_it_read(method, given):
    """Beside every time: sequences that a method read, of 3 iterations or 4 steps."""
    steps = {"iterations": 3} if WAYS[method].iterations else {}
    chosen = PruneSettings(method=method, sparsity=0.3, sheared_steps=4, **{"samples": 4, **steps, **given})
    model, drawn = tiny_model(max_position_embeddings=64), []

    def calibration(_):
        size = max(1, min(chosen.samples, 640 // chosen.sample_length))
        ids = torch.randint(0, model.config.vocab_size, (chosen.samples, chosen.sample_length)).split(size)
        drawn.append([Read({"input_ids": part, "labels": part}) for part in ids])
        return drawn[-1]

    prune_model(model, chosen, calibration)
    read = sum(len(dict.__getitem__(batch, "input_ids")) for some in drawn for batch in some if batch.seen)
    assert sequences_seen(chosen) == read
    words = calibration_in_words(chosen)
    assert words.startswith(f"{read} sequence" if read else "no calibration text")


def test_a_method_that_looks_at_nothing_says_so(text, tmp_path, capsys):
    out = tmp_path / "small"
    assert prune("--sparsity", "0.3", "--data", str(text), "--method", "random", "--out", str(out)) == 0
    assert "s, on no calibration text" in capsys.readouterr().out
    card, report = (out / "README.md").read_text(), (out / "report.html").read_text()
    assert "looked at no calibration text" in card and "Calibrated on" not in card
    assert "calibrated on" not in report and "on no calibration text" in report


def test_notes_on_what_has_no_effect_and_on_a_class_of_its_own():
    def told(method, **given):
        return unused(PruneSettings(method=method, sparsity=0.2, **given))

    assert told("adapt", amplitude=0.5, rule="literal", similarity="manhattan") == []
    assert told("adapt", amplitude=0.5, uniform=True) == ["amplitude"]
    assert told("llm-pruner", amplitude=0.7, rule="literal", similarity="manhattan", sheared_steps=9) == [
        *("amplitude", "rule", "similarity", "sheared_steps")
    ]
    assert told("llm-pruner", amplitude=0.7, uniform=False) == []
    assert told("shortgpt", uniform=True, min_groups=2, min_channels=190, similarity="euclidean") == [
        *("uniform", "min_groups", "min_channels")
    ]
    assert all(told(method) == [] for method in METHODS)
    assert told("adapt", preset="at-once", uniform=True) == told("llm-pruner", preset="at-once") == []
    assert told("llm-pruner", preset="at-once", amplitude=0.5) == ["amplitude"]

    class Calibration:
        def __call__(self, iteration):
            return [{"input_ids": torch.arange(16)[None]}]

    model = tiny_model(num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    pruned = prune_model(model, PruneSettings("magnitude", sparsity=0.25, amplitude=0.5), Calibration())
    own, without = notes_on(pruned)
    assert "transformers has no LlamaConfig of 6 heads, 3 key-value groups" in own
    assert without == "without effect on magnitude: amplitude"


def test_where_a_config_has_no_head_dim_of_its_own_a_note_says_who_misreads_it():
    def told(family, sparsity):
        pruned = prune_model(tiny_model(family), PruneSettings("magnitude", sparsity=sparsity), lambda _: [])
        return pruned.shapes[0].num_attention_heads, [note for note in notes_on(pruned) if "head_dim" in note]

    heads, (note,) = told("qwen2", 0.5)
    assert note.startswith(f"{heads} heads of 8 are not the hidden size 32: ") and "--format padded" in note
    assert heads == 2 and told("llama", 0.5) == (2, [])
    assert told("qwen2", 0.05) == (4, [])


def test_what_a_killed_run_left_is_removed(tmp_path):
    left = tmp_path / ".small.unfinished-abc"
    left.mkdir()
    (left / "model.safetensors").write_text("torn")
    other = tmp_path / ".small2.unfinished-abc"
    other.mkdir()
    run.check_out(tmp_path / "small")
    assert not left.exists() and other.exists()


def test_an_interrupted_run_leaves_nothing(text, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run._Bar, "step", interrupted)
    assert prune("--sparsity", "0.3", "--data", str(text), "--out", str(tmp_path / "small")) == 130
    assert not (tmp_path / "small").exists() and not list(tmp_path.glob(".small*"))
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--sparsity", "0.95"), "at most sparsity"),
        (("--target-parameters", "1B"), "above the model's 214,080"),
        (("--sparsity", "0.2", "--samples", "100000"), "sequences of 64 tokens"),
        (("--sparsity", "0.2", "--width-multiple", "256"), "192 channels"),
        (("--sparsity", "0.2", "--samples", "1", "--sample-length", "4096"), "sequences of 4096 tokens"),
        (("sparsity=2",), "between 0 and 1"),
        (("sparsity=20%",), "command line: sparsity: '20%' must be a number (20% is written 0.2) or null"),
        (("--sparsity", "0.2", "seed=-1"), "command line: seed: -1 must be at least 0"),
        (("--sparsity", "0.2", "samples=0"), "command line: samples: 0 must be at least 1"),
        (("target_parameters=0.1G",), "target_parameters 100,000,000 is above the model's 214,080"),
        (("target_parameters=100X",), "'100X' must be a whole number (100M, 1.5B, 134515008) or null"),
        ((), "one of the two"),
        (("--sparsity", "0.2", "sampels=3"), "sampels"),
        (("--sparsity", "0.2", "other-model"), "one MODEL"),
        (("--sparsity", "0.2", "a=[1"), "command line: a: '[1' is not valid YAML"),
    ],
)
def test_bad_input_is_one_line(text, tmp_path, capsys, words, says):
    assert prune(*words, "--data", str(text), "--out", str(tmp_path / "small")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("graftlm: ") and says in error
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--sparsity", "2"), "must be between 0 and 1"),
        (("--sparsity", "20%"), "'20%' is no number; it is written 0.2"),
        (("--sparsity", "nan"), "must be between 0 and 1"),
        (("--sparsity", "0.2", "--seed", "-1"), "-1 must not be negative"),
        (("--sparsity", "0.2", "--samples", "0"), "0 must be at least 1"),
        (("--sparsity", "0.2", "--amplitude", "nan"), "must not be negative"),
    ],
)
def test_bad_options_are_one_line(words, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        prune(*words, "--out", str(tmp_path / "small"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and says in error and error.endswith("see graftlm prune --help")


def test_settings_may_be_words(text, tmp_path):
    out = tmp_path / "small"
    given = ("--sparsity", "0.3", "--data", str(text), "--out", str(out))
    assert prune(*given, "method=magnitude", "seed=3") == 0
    settings = json.loads((out / "pruning.json").read_text())["settings"]
    assert settings["method"] == "magnitude" and settings["seed"] == 3
