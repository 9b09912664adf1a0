"""Whatever is wrong with what a run is given: one line that says what and what to do, and nothing lost."""

import contextlib
import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from tiny_runs import assert_same_run, files_of, read_metrics, tiny_config, write_chats
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftlm import cli
from graftlm.configuring import dump_yaml, load_config
from graftlm.models import load_model, load_tokenizer, save_model
from graftlm.training import run, run_trainer
from graftlm.training.config import RunConfig
from graftlm.training.run import train_one


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return tiny_config(tmp_path, save_steps=2)


@pytest.fixture
def refused(config, tmp_path, capsys):
    """refused(*words) is the line on which `graftlm train` with these settings fails; nothing half-written is left."""

    def refuse(*words: str, code: int = 2) -> str:
        (tmp_path / "c.yaml").write_text(dump_yaml(config))
        assert cli.main(["train", str(tmp_path / "c.yaml"), *words]) == code
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        [line] = [line for line in shown.splitlines() if line.startswith("graftlm: ")]
        assert shown.endswith(line + "\n")
        found = files_of(tmp_path / "run") if (tmp_path / "run").exists() else set()
        assert not [name for name in found if "unfinished" in name or name.startswith(("model/", "summary"))]
        return line.removeprefix("graftlm: ")

    return refuse


def rows(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return f"data={path}"


ONLY_DATA = ("eval_data=[]", "eval_fraction=0")


def test_a_source_is_named_by_its_key(refused):
    assert refused("eval_data=missing.txt").startswith("eval_data: missing.txt: no such file or folder")
    assert refused("selection_data=missing.txt").startswith("selection_data: missing.txt: no such file or folder")
    assert refused("data=missing.txt").startswith("data: missing.txt: no such file or folder")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "arrow"])
def test_tables_in_other_forms_are_no_texts(refused, tmp_path, suffix):
    """They would be trained on as they stand, commas and quotes and all."""
    (tmp_path / f"x.{suffix}").write_text("text,label\nOnce upon a time,1\n" * 50)
    assert f"x.{suffix}: .{suffix} is not read; write it as .jsonl or .parquet" in refused(
        f"data={tmp_path}/x.{suffix}"
    )


def test_a_folder_of_save_to_disk_is_no_folder_of_texts(refused, tmp_path):
    datasets.Dataset.from_dict({"text": ["Once upon a time"] * 50}).save_to_disk(tmp_path / "saved")
    line = refused(f"data={tmp_path}/saved")
    assert "written by datasets.save_to_disk, which is not read" in line and "to_parquet" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("report_to=[tensorbord]", "report_to: 'tensorbord' must be one of tensorboard"),
        ("optim=adamw", "optim: adamw is no optimizer of transformers; try adamw_torch"),
        ("lr_scheduler_type=cosin", "lr_scheduler_type: cosin is no schedule of transformers; did you mean cosine?"),
        ("attn_implementation=flash_attention_2", "attn_implementation: flash_attention_2 needs a GPU and the package"),
    ],
)
def test_the_nearest_and_what_to_install(refused, words, said, monkeypatch):
    monkeypatch.setattr("graftlm.training.arguments.is_flash_attn_2_available", lambda: False)
    assert said in refused(words, "bf16=true")


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("lerning_rate=1e-3", "unknown key 'lerning_rate' (did you mean learning_rate?)"),
        ("k_heads=0.2", "unknown key 'k_heads' (did you mean apex.k_heads?)"),
        ("max_steps=many", "max_steps"),
        ("learning_rate=-1", "learning_rate: -1"),
        ("apex.k_heads=0.6", "apex.k_heads: 0.6 must be above 0 and at most 0.5"),
        ("apex.stages=13", "apex.stages: 13 stages do not fit in 12 steps"),
        ("apex.trains=tiny", "full, half, small"),
        ("lr_scheduler_type=cosin", "cosin"),
        ("optim=adamm", "adamm"),
        ("attn_implementation=flash_attention_2", "flash_attention_2 computes in 16 bits only; set bf16: true"),
        ("seed=-1", "seed: -1 must be from 0 to 4294967295"),
        ("lr_scheduler_type=warmup_stable_decay", "warmup_stable_decay with no lr_scheduler_kwargs"),
        ("lr_scheduler_type=cosine_with_min_lr", "cosine_with_min_lr with no lr_scheduler_kwargs"),
        ("lr_scheduler_kwargs={min_lr_rate: 0.1}", "'min_lr_rate'"),
        ("report_to=trackio", "report_to: trackio is not installed; pip install trackio"),
        ("model=no/such/model/here", "no/such/model/here: no such folder"),
        ("data=none.txt", "none.txt: no such file"),
        ("eval_data=none.txt", "none.txt: no such file"),
    ],
)
def test_settings(word, says, refused, config):
    assert says in refused(word)
    assert not Path(config.output_dir, "checkpoints").exists()


def test_a_place_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(f"output_dir={tmp_path}/file/run")
    assert line.startswith(f"cannot write {tmp_path}/file/run")


def test_in_a_process_of_its_own(config, tmp_path):
    """What a person sees: one line, nothing else."""
    (tmp_path / "c.yaml").write_text("model: tiny-llama\ndata: a.txt\nlerning_rate: 1e-3\n")
    command = [sys.executable, "-m", "graftlm", "train", str(tmp_path / "c.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    where = f"graftlm: {tmp_path}/c.yaml:3: unknown key 'lerning_rate' (did you mean learning_rate?)"
    assert done.stderr.startswith(where)
    assert done.stderr.count("\n") == 1


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (({"text": "good"}, "", {"text": "good"}), "bad.jsonl:2: empty line; remove it"),
        (({"text": "good"}, '{"text": "to'), "bad.jsonl:2: not valid JSON"),
        (({"text": "good"}, "[1]"), "bad.jsonl:2: a JSON object is needed"),
        (({"text": "good"}, {"txet": "bad"}), "bad.jsonl:2"),
        (({"body": "bad"},), "bad.jsonl:1"),
        (({"messages": [{"role": "user", "content": "x"}]},), "bad.jsonl:1: no assistant message"),
        (({"messages": [{"role": "assistant"}]},), "bad.jsonl:1: message 1 has no content"),
    ],
)
def test_data_lines(lines, says, refused, tmp_path):
    assert says in refused(rows(tmp_path / "bad.jsonl", *lines), *ONLY_DATA)
    assert not [name for name in files_of(tmp_path) if name.endswith(".arrow")]  # half a cache would be used next time


def test_mended_data_train(refused, config, tmp_path):
    good = Path(config.data[0].path).read_text()
    Path(config.data[0].path).write_text(good + "\n")
    assert "text.jsonl:6: empty line" in refused()
    Path(config.data[0].path).write_text(good)
    assert train_one(config)["steps"] == 12


def test_nothing_to_learn(refused, tmp_path):
    """No supervised token is left: the prompts alone are longer than a sequence."""
    long = {"messages": [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "y"}]}
    line = refused(rows(tmp_path / "long.jsonl", long, long), *ONLY_DATA)
    assert "long.jsonl: no supervised token left, 2 of 2 conversations were dropped; raise max_length" in line


# --- models ----------------------------------------------------------------------------------------------------------


def save_tokenizer(folder: Path, **special) -> str:
    """tiny-llama with a tokenizer that has only the given special tokens and no chat template."""
    rules = json.loads(load_tokenizer("tiny-llama").backend_tokenizer.to_str())
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] in special.values()]
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)), **special)
    save_model(load_model("tiny-llama"), bare, folder)
    return f"model={folder}"


def test_no_token_to_pad_with(refused, tmp_path):
    line = refused(save_tokenizer(tmp_path / "bare"))
    assert line.endswith("no pad, unk or eos token to pad with; set pad_token in tokenizer_config.json")


def test_no_chat_template(refused, tmp_path):
    word = save_tokenizer(tmp_path / "bare", eos_token="<|im_end|>", pad_token="<pad>")
    write_chats(tmp_path / "chats.jsonl")
    line = refused(word, f"data={tmp_path}/chats.jsonl", *ONLY_DATA)
    assert line.startswith("chat_template: the model's tokenizer has none")
    assert "chatml" in line


def small_model(folder: Path, **changes) -> str:
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 6}
    config = LlamaConfig(**{"vocab_size": 264, "num_key_value_heads": 3, "head_dim": 4, **shape, **changes})
    save_model(LlamaForCausalLM(config), load_tokenizer("tiny-llama"), folder)
    return f"model={folder}"


def test_a_tokenizer_larger_than_the_embedding(refused, tmp_path):
    line = refused(small_model(tmp_path / "small", vocab_size=200))
    assert line.startswith("the tokenizer has 259 tokens, the model's embedding 200 rows")


def test_sets_that_would_overlap(refused, tmp_path):
    line = refused(small_model(tmp_path / "small"), "apex.k_heads=0.5")
    assert line.startswith(
        "apex.k_heads: 0.5 of 3 key-value groups in layer 0 is 2, and P and N of 2 each would overlap"
    )
    assert "choose at most 0.3333" in line


def test_a_budget_that_is_too_small(refused):
    assert refused("apex.trains=small", "apex.budget=0.001").startswith("apex.budget: 0.001 of")


# --- while it trains -------------------------------------------------------------------------------------------------


def state(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize(("where", "trains"), [("loss", "full"), ("gradient", "full"), ("gradient", "small")])
def test_nan_stops_before_the_update(where, trains, refused, config, tmp_path, monkeypatch):
    """The step is not taken, what was saved stays, and without the NaN the run goes on as if it had never been."""
    held = {}

    class Broken(run_trainer.RunTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if self.state.global_step != 6:
                return super().training_step(model, inputs, *args, **kwargs)
            held.setdefault("before", state(self))
            held["trainer"] = self
            if where == "gradient":
                loss = super().training_step(model, inputs, *args, **kwargs)
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                gradients[-1].view(-1)[0] = float("nan")
                return loss
            with torch.no_grad():
                kept = model.model.norm.weight.clone()
                model.model.norm.weight[0] = float("nan")
            try:
                return super().training_step(model, inputs, *args, **kwargs)
            finally:
                with torch.no_grad():
                    model.model.norm.weight.copy_(kept)

    words = [f"apex.trains={trains}", *(["apex.budget=0.3"] if trains == "small" else [])]
    with monkeypatch.context() as patch:
        patch.setattr(run, "RunTrainer", Broken)
        line = refused(*words)
    what = {"loss": "the loss", "gradient": "a gradient"}[where]
    assert line.startswith(f"{what} is NaN or Inf at step 7 of {tmp_path}/run; the step was not taken")
    after = state(held["trainer"])
    assert all(torch.equal(after[name], value) for name, value in held["before"].items())
    assert read_metrics(tmp_path / "run")[-1]["step"] == 6
    train_one(load_config(tmp_path / "run/config.yaml"), resume=True)
    assert [line["step"] for line in read_metrics(tmp_path / "run") if line["event"] == "train"] == list(range(1, 13))


def test_nan_in_the_model(refused, tmp_path):
    model = load_model("tiny-llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    save_model(model, load_tokenizer("tiny-llama"), tmp_path / "nan")
    assert refused(f"model={tmp_path}/nan").startswith("the loss is NaN or Inf at step 1")


# --- disk ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def space_for(writes: float):
    """A disk that is full after so many times that something was to be put on it for good; counts them."""
    fsync = os.fsync
    made = []

    def full(descriptor):
        made.append(descriptor)
        if len(made) > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield made


@pytest.fixture(scope="module")
def whole_and_writes(tmp_path_factory) -> tuple[Path, int]:
    """The run folder of a run to which nothing happened, and how often it put something on the disk."""
    folder = tmp_path_factory.mktemp("whole")
    with space_for(math.inf) as made:
        train_one(tiny_config(folder, save_steps=2))
    return folder / "run", len(made)


@pytest.fixture
def whole(whole_and_writes) -> Path:
    return whole_and_writes[0]


def test_torn_checkpoint(refused, config, tmp_path, whole):
    train_one(config)
    for name in ("summary.json", "activations.safetensors"):  # as if killed before it could end
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run/model")
    assert refused() == (
        f"{tmp_path}/run holds an unfinished run: go on with --resume, give another output_dir, or delete the folder"
    )
    last = tmp_path / "run/checkpoints/step-12"
    names = ("optimizer.safetensors", "model.safetensors", "apex.safetensors", "random.safetensors")
    for name in (*names, "trainer_state.json"):
        contents = (last / name).read_bytes()
        (last / name).write_bytes(contents[:-100])
        line = refused("--resume")
        assert line.startswith(f"{last / name}: ")
        assert f"delete the checkpoint {last} and go on from an earlier one" in line
        (last / name).write_bytes(contents)
    shutil.rmtree(last)
    train_one(config, resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_full_disk(share, refused, config, tmp_path, whole_and_writes):
    """The disk is full when something is to be put on it; with space again, the run goes on as if nothing had been."""
    whole, writes = whole_and_writes
    with space_for(share * writes):
        line = refused()
    assert line.startswith("cannot write ")
    assert "No space left on device; free space" in line
    train_one(config, resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("a file system of its own takes root")
    options = ["-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let root mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk, refused, config, whole):
    """A checkpoint of the tiny model takes 2.6 MB: one fits, and not a second beside it."""
    output = small_disk / "run"
    line = refused(f"output_dir={output}")
    assert line.startswith(f"cannot write {output}/")
    assert "No space left on device" in line
    assert line.endswith("free space or choose another folder")
    assert not [name for name in files_of(output) if "unfinished" in name]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-2"]
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    train_one(load_config(output / "config.yaml"), resume=True)
    ours, theirs = (folder / "model/model.safetensors" for folder in (output, whole))
    assert ours.read_bytes() == theirs.read_bytes()
