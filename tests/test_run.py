"""Whole runs: what is in the folder, what the summary says, and that the model in it is the one that was trained."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    ONLY_TIMES,
    files_of,
    model_with_dropout,
    read_metrics,
    tiny_config,
    words,
    write_chats,
    write_texts,
)
from transformers import GPT2Config, GPT2LMHeadModel

from graftlm import cli
from graftlm.configuring import dump_yaml, load_config
from graftlm.errors import UserError
from graftlm.models import load_model, load_tokenizer, save_model
from graftlm.reporting import nextsteps
from graftlm.training import finishing, run
from graftlm.training.config import DistributedConfig, SourceConfig
from graftlm.training.data import prepare_data
from graftlm.training.data.packing import Block
from graftlm.training.plan import plan
from graftlm.training.run import train, train_one

SUMMARY = {
    *("method", "tokens", "steps", "seconds", "tokens_per_second", "peak_memory_bytes", "trainable_parameters"),
    *("trainable_fraction", "operator_parameters", "eval_loss_start", "eval_loss_end", "control"),
    *("fused_max_abs_logit_difference", "stages"),
}
STAGE = {
    *("step", "tokens", "steps", "heads", "channels", "eval_loss_start"),
    *("eval_loss_before_fusion", "eval_loss_after_fusion"),
}
TOKENS = sum(len(words(60, i)) + 1 for i in range(5))
"""Of the data of tiny_config: one a letter, and one that ends the document."""
IDS = torch.arange(40, 72)[None]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, logits of the live model on IDS) of a run with a control. Stages begin at steps 0, 4 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    settings = {"max_steps": -1, "num_train_epochs": 2, "save_steps": 6, "control": True, "apex": {"trains": "half"}}
    config = tiny_config(folder, model=model_with_dropout(folder / "given"), **settings)
    live = []

    def save_model(model, *args, **kwargs):
        live.append(finishing.logits_of(model, IDS))
        return saved(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        saved = finishing.save_model
        patch.setattr(finishing, "save_model", save_model)
        assert train(config) == folder / "run"
    return config, live[0]


@pytest.fixture
def folder(finished):
    return Path(finished[0].output_dir)


def read(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_what_is_in_the_folder(finished, folder):
    found = files_of(folder)
    both = {"config.yaml", "data.json", "environment.json", "metrics.jsonl", "summary.json", "activations.safetensors"}
    both |= {f"model/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md")}
    assert both | {"report.html"} <= found
    assert {f"control/{name}" for name in both} <= found
    assert any(name.startswith("plots/") and name.endswith(".png") for name in found)
    checkpoints = {Path(name).parts[1] for name in found if name.startswith("checkpoints/")}
    assert checkpoints == {"step-8", "step-12"}  # the last two of 4 (a boundary), 6, 8 (a boundary) and 12
    allowed = (*both, ".lock", "report.html", "plots/", "checkpoints/", "control/", "model/")
    assert [name for name in found if not name.startswith(tuple(allowed))] == []
    assert load_config(folder / "config.yaml") == finished[0]


def test_the_models_card_shows_the_control(finished, folder, tmp_path, monkeypatch):
    card = (folder / "model/README.md").read_text()
    summary = read(folder)
    ends = [f"{one['eval_loss_end']:.4f}" for one in (summary, summary["control"])]
    (row,) = [line for line in card.splitlines() if line.startswith("| evaluation loss, end")]
    assert all(end in row for end in ends) and "plain training, same tokens" in card
    assert "Largest change of a logit" in card  # known only after the model was saved

    # Killed between card and summary, both are written again.
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "summary.json").write_text(json.dumps({**summary, "control": None}))
    (copy / "model/README.md").write_text("old")
    config = dataclasses.replace(finished[0], output_dir=str(copy))
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_json", lambda path, value: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, resume=True)
    assert (copy / "model/README.md").read_text() == card and read(copy)["control"] is None
    (copy / "model/README.md").write_text("old")
    train(config, resume=True)
    assert (copy / "model/README.md").read_text() == card and read(copy)["control"] == summary["control"]


def test_summary(folder):
    summary = read(folder)
    assert summary.keys() >= SUMMARY
    assert summary["control"].keys() >= SUMMARY
    assert (summary["method"], summary["control"]["method"]) == ("apex", "full")
    assert summary["control"]["control"] is None
    for one in (summary, summary["control"]):
        assert one["steps"] == 12
        assert one["tokens"] == 2 * TOKENS  # twice all tokens of the data: neither padding nor evaluation counts
        assert one["seconds"] > 0
        assert one["peak_memory_bytes"] > 50e6
        assert one["eval_loss_end"] < one["eval_loss_start"]
        assert one["fused_max_abs_logit_difference"] == 0
        assert one["data"]["tokens"] == TOKENS and one["data"]["epochs"] == 2
        held_out = len(words(60, 100)) + 1  # in 5 blocks, of which 4 are measured, the shorter last one too
        assert (one["data"]["evaluation_blocks"], one["data"]["evaluation_tokens"]) == (4, held_out - 64)
        assert one["trainable_fraction"] == one["trainable_parameters"] / one["total_parameters"]
    assert summary["eval_loss_start"] == summary["control"]["eval_loss_start"]
    assert summary["operator_parameters"] > 0 == summary["control"]["operator_parameters"]
    assert summary["trainable_fraction"] == pytest.approx(0.52, abs=1e-3)
    assert (summary["control"]["trainable_fraction"], summary["control"]["stages"]) == (1, [])


def test_stages(folder):
    stages = read(folder)["stages"]
    assert [(stage["step"], stage["steps"]) for stage in stages] == [(0, 4), (4, 4), (8, 4)]
    tokens = {line["step"]: line["tokens"] for line in read_metrics(folder) if line["event"] == "train"}
    assert [stage["tokens"] for stage in stages] == [0, tokens[4], tokens[8]]
    assert tokens[12] == 2 * TOKENS
    for stage in stages:
        assert stage.keys() >= STAGE
        assert stage["eval_loss_before_fusion"] == stage["eval_loss_after_fusion"] < stage["eval_loss_start"]
        assert stage["effective_k"] == {"heads": 0.5, "channels": 0.125}
        assert stage["moved"].keys() == {"v", "o", "gate", "up", "down", "all"}
        assert stage["moved"]["all"]["operator"] > 0 < stage["moved"]["all"]["own"] < stage["moved"]["all"]["weight"]
        assert 0 < stage["multiplier"]["lowest"] <= stage["multiplier"]["highest"]
        for kind, size in (("heads", 1), ("channels", 24)):
            assert stage[kind].keys() == {"0", "1", "2", "3"}
            for sets in stage[kind].values():
                high, low = set(sets["advantageous"]), set(sets["disadvantageous"])
                assert len(high) == len(low) == size
                assert not high & low
    assert stages[0]["channels"] != stages[1]["channels"]


def test_metrics(folder):
    lines = read_metrics(folder)
    trained = [line for line in lines if line["event"] == "train"]
    assert [(line["step"], line["stage"]) for line in trained] == [(i + 1, i // 4) for i in range(12)]
    evaluated = [(line["when"], line["step"], line["stage"]) for line in lines if line["event"] == "eval"]
    boundaries = [(4, 0), (8, 1)]
    expected = [("start", 0, 0)]
    for step, stage in boundaries:
        expected += [("before_fusion", step, stage), ("after_fusion", step, stage + 1)]
    assert evaluated == [*expected, ("before_fusion", 12, 2), ("after_fusion", 12, 2)]
    plain = [line for line in read_metrics(folder / "control") if line["event"] == "train"]
    assert [(line["step"], line["learning_rate"], line["tokens"]) for line in plain] == [
        (line["step"], line["learning_rate"], line["tokens"]) for line in trained
    ]
    assert plain[0]["loss"] == trained[0]["loss"]  # the same model, batch and dropout
    assert plain[-1]["loss"] != trained[-1]["loss"]
    when = [(line["when"], line["step"]) for line in read_metrics(folder / "control") if line["event"] == "eval"]
    assert when == [("start", 0), ("periodic", 4), ("periodic", 8), ("end", 12)]


def test_activations(folder):
    tensors = load_file(folder / "activations.safetensors")
    assert len(tensors) == 2 * 2 * 4
    for key, values in tensors.items():
        when, kind, layer = key.split("/")
        assert when in ("before", "after")
        assert values.shape == ({"heads": 4, "channels": 192}[kind],)
        assert values.dtype == torch.float32
        assert values.min() >= 0
        assert int(layer) in range(4)
    before = load_file(folder / "control/activations.safetensors")
    assert all(torch.equal(tensors[key], before[key]) for key in tensors if key.startswith("before"))


REOPEN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert type(model).__module__.startswith("transformers."), type(model)
assert model.config.use_cache
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = "the cat sees a fish"
assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
assert tokenizer.pad_token_id is not None and tokenizer.chat_template
torch.set_num_threads(1)
with torch.no_grad():
    torch.save(model(torch.arange(40, 72)[None]).logits, sys.argv[2])
"""


def test_stock_transformers_reopens_the_live_model(finished, folder, tmp_path):
    command = [sys.executable, "-c", REOPEN, str(folder / "model"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True)
    reopened = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert (reopened - finished[1]).abs().max() == 0


def test_a_finished_run_is_not_written_over(finished, folder):
    before = {name: (folder / name).stat().st_mtime_ns for name in files_of(folder)}
    with pytest.raises(UserError, match="holds a finished run: give another output_dir, or delete the folder"):
        train(finished[0])
    assert {name: (folder / name).stat().st_mtime_ns for name in files_of(folder)} == before


def test_resuming_a_finished_run_does_nothing_again(finished, folder):
    def times():
        shown = ("plots/", "report.html")
        return {name: (folder / name).stat().st_mtime_ns for name in files_of(folder) if not name.startswith(shown)}

    before = times()
    train(finished[0], resume=True)
    assert times() == before


# --- kinds of runs ---------------------------------------------------------------------------------------------------


def run_briefly(folder: Path, **changes) -> tuple[dict, Path]:
    config = tiny_config(folder, **{"max_steps": 4, "apex": {"stages": 2}, **changes})
    summary = train_one(config)
    assert summary["steps"] == config.max_steps
    assert summary["fused_max_abs_logit_difference"] == 0
    return summary, Path(config.output_dir)


def test_plain_training(tmp_path):
    summary, folder = run_briefly(tmp_path, method="full", eval_steps=3)
    assert (summary["stages"], summary["operator_parameters"], summary["trainable_fraction"]) == ([], 0, 1)
    when = [(line["when"], line["step"]) for line in read_metrics(folder) if line["event"] == "eval"]
    assert when == [("start", 0), ("periodic", 3), ("end", 4)]


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True},
        {"dtype": "bfloat16"},
        {"gradient_checkpointing": True},
        {"apex": {"stages": 2, "assessment": "random", "stage_by": "tokens", "stage_length": 300}},
        {"optim": "adafactor", "apex": {"stages": 2, "trains": "small", "budget": 0.3}},
    ],
    ids=["bf16", "bfloat16", "checkpointing", "random", "adafactor"],
)
def test_settings(changes, tmp_path):
    summary, folder = run_briefly(tmp_path, **changes)
    assert len(summary["stages"]) == 2
    for stage in summary["stages"]:
        assert stage["eval_loss_before_fusion"] == stage["eval_loss_after_fusion"]
    dtype = {torch.bfloat16 if changes.get("dtype") else torch.float32}
    assert {value.dtype for value in load_file(folder / "model/model.safetensors").values()} == dtype


def text_file(folder: Path) -> Path:
    (folder / "a.txt").write_text(words(300))
    return folder / "a.txt"


def source_folder(folder: Path) -> Path:
    (folder / "code/inner").mkdir(parents=True)
    for i, name in enumerate(("one.py", "inner/two.py", "inner/three.txt")):
        (folder / "code" / name).write_text(words(100, i))
    return folder / "code"


def parquet_file(folder: Path) -> Path:
    pq.write_table(pa.table({"text": [words(60, i) for i in range(5)]}), folder / "a.parquet")
    return folder / "a.parquet"


@pytest.mark.parametrize("make", [text_file, source_folder, parquet_file])
def test_sources(make, tmp_path):
    config = tiny_config(tmp_path, data=make(tmp_path), apex={"stages": 2}, max_steps=-1, num_train_epochs=1)
    summary = train_one(config)
    assert summary["tokens"] == summary["data"]["tokens"] > 1000
    assert summary["data"]["supervised_share"] > 0.95


def test_streaming(tmp_path):
    summary, _ = run_briefly(tmp_path, streaming=True)
    assert summary["tokens"] == 4 * 2 * 2 * 64
    assert not (tmp_path / "cache").joinpath("blocks").exists()


def test_a_stream_is_read_again_and_no_pass_ends_in_a_step_of_its_own(tmp_path):
    """Text that repeats after 5 blocks, read as a stream of 5 blocks again and again or as one long text, trains alike:
    a group of gradient accumulation may span two passes."""
    once = [{"text": words(20, n)} for n in range(5)]
    many = {"packing": False, "truncation": "truncate", "method": "full", "streaming": True, "max_steps": 8}
    losses = []
    for name, rows in (("short", once), ("long", once * 8)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        _, folder = run_briefly(tmp_path / name, data=path, **many)
        losses.append([line["loss"] for line in read_metrics(folder) if line["event"] == "train"])
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_a_weighted_mixture_sees_all_of_its_large_source(tmp_path):
    """Over epochs; and a run that is resumed in a later one sees the same of it."""
    large, small = write_texts(tmp_path / "large.jsonl"), write_texts(tmp_path / "small.jsonl", 1, first=50)
    sources = (SourceConfig(str(large), weight=1.0), SourceConfig(str(small), weight=1.0))
    config = dataclasses.replace(
        tiny_config(tmp_path, method="full", max_steps=16, save_steps=6, save_total_limit=9), data=sources
    )
    seen = set()
    with pytest.MonkeyPatch.context() as patch:
        item = Block.item
        patch.setattr(Block, "item", lambda block: seen.add(block.input_ids.tobytes()) or item(block))
        train_one(config)
    counted = prepare_data(config, load_tokenizer("tiny-llama"), progress=False).train
    assert len(counted) < len(counted.sources[0])  # an epoch is not all of it, and there are several
    assert {counted.sources[0][i].input_ids.tobytes() for i in range(len(counted.sources[0]))} <= seen
    shutil.copytree(tmp_path / "run/checkpoints/step-6", tmp_path / "again/checkpoints/step-6")
    train_one(dataclasses.replace(config, output_dir=str(tmp_path / "again")), resume=True)
    whole, other = (load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(whole[name], other[name]) for name in whole)


def test_a_stream_goes_on_where_it_stopped(tmp_path):
    """More steps than a pass over the data has."""
    whole = tiny_config(tmp_path / "whole", method="full", streaming=True, max_steps=18, save_steps=14)
    train_one(whole)
    again = dataclasses.replace(whole, output_dir=str(tmp_path / "again"))
    kept = tmp_path / "whole/run/checkpoints/step-14"
    shutil.copytree(kept, tmp_path / "again/checkpoints/step-14")
    train_one(again, resume=True)
    model, other = (
        load_file(folder / "model/model.safetensors") for folder in (tmp_path / "whole/run", tmp_path / "again")
    )
    assert all(torch.equal(model[name], other[name]) for name in model)


def test_the_same_data_from_elsewhere(tmp_path):
    """Copied anew, or moved, they are the same data; one byte more, and they are not."""
    config = tiny_config(tmp_path, method="full", max_steps=4, save_steps=2)
    train_one(config)
    for name, change in (("moved", 0), ("changed", 1)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "text.jsonl"
        text = (tmp_path / "text.jsonl").read_text()
        path.write_text(text[:40] + "z" * change + text[40 + change :])
        run_folder = tmp_path / f"{name}-run"
        shutil.copytree(tmp_path / "run/checkpoints/step-2", run_folder / "checkpoints/step-2")
        shutil.copy(tmp_path / "run/data.json", run_folder)
        other = dataclasses.replace(config, data=(SourceConfig(str(path)),), output_dir=str(run_folder))
        if change:
            with pytest.raises(UserError, match=r"the data .* has changed"):
                train_one(other, resume=True)
        else:
            assert train_one(other, resume=True)["steps"] == 4


def test_a_model_with_code_of_its_own(tmp_path, capsys):
    """Reopened at the end as it was opened, with its code; and so by the commands that are printed then."""
    model, folder = load_model("tiny-llama"), tmp_path / "model"
    save_model(model, load_tokenizer("tiny-llama"), folder)
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    told = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    told |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": code}
    (folder / "config.json").write_text(json.dumps(told))
    _, done = run_briefly(tmp_path / "run", model=str(folder), method="full", trust_remote_code=True)
    told = [shlex.split(command)[1:] for _, command in nextsteps.commands(done)]
    assert [cli.parse(words).trust_remote_code for words in told] == [True] * 3
    assert cli.main([*told[0], "--max-new-tokens", "1"]) == 0
    assert cli.main([word for word in told[0] if word != "--trust-remote-code"]) == 2
    assert "give --trust-remote-code" in capsys.readouterr().err


def test_plain_training_of_a_family_that_apex_does_not_know(tmp_path):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 264}
    save_model(GPT2LMHeadModel(GPT2Config(**sizes)), load_tokenizer("tiny-llama"), tmp_path / "model")
    summary, _ = run_briefly(tmp_path / "run", model=str(tmp_path / "model"), method="full")
    assert any("the report has no activations" in note for note in summary["notes"])
    longer = tiny_config(tmp_path / "longer", model=str(tmp_path / "model"), method="full", max_length=128)
    for refused in (train, plan):  # its positions lie in a table
        with pytest.raises(UserError, match="max_length: 128 is above the model's context of 64 tokens"):
            refused(longer)


def test_sequences_beyond_the_model_s_context_are_a_note(tmp_path):
    model = load_model("tiny-llama")
    model.config.max_position_embeddings = 16
    save_model(model, load_tokenizer("tiny-llama"), tmp_path / "model")
    summary, _ = run_briefly(tmp_path / "run", model=str(tmp_path / "model"), method="full")
    assert any("above the model's context of 16 tokens" in note for note in summary["notes"])


def test_rates_of_stages_are_of_stages(tmp_path):
    """A plain run has none, whatever apex.stage_learning_rates say."""
    rates = {"stages": 2, "stage_learning_rates": (1e-5, 1e-6)}
    _, folder = run_briefly(tmp_path, method="full", apex=rates, learning_rate=1e-3, lr_scheduler_type="constant")
    assert {line["learning_rate"] for line in read_metrics(folder) if line["event"] == "train"} == {1e-3}


def test_a_split_is_neither_what_fusion_did_nor_where_training_began(tmp_path):
    config = tiny_config(tmp_path, apex={"start": "split", "split_tolerance": 10.0, "trains": "full"}, control=True)
    summary = read(train(config))
    assert summary["eval_loss_start"] == summary["control"]["eval_loss_start"]
    for stage in summary["stages"]:
        assert stage["eval_loss_before_fusion"] == stage["eval_loss_after_fusion"]
    evaluated = [line for line in read_metrics(tmp_path / "run") if line["event"] == "eval"]
    split = [line for line in evaluated if line["when"] == "stage_start"]
    assert [line["loss"] for line in split] == [stage["eval_loss_start"] for stage in summary["stages"]]
    assert split[0]["loss"] != summary["eval_loss_start"]
    mixed = tiny_config(tmp_path / "mixed", bf16=True, apex=config.apex.__dict__ | {"trains": "full"}, control=True)
    summary = read(train(mixed))  # before the first split, too, the loss is that of autocast
    assert summary["eval_loss_start"] == summary["control"]["eval_loss_start"]
    assert len([note for note in summary["notes"] if "splitting" in note]) == 2 * len(summary["stages"])


def test_what_does_not_fit_beside_the_model_is_a_note(tmp_path, monkeypatch):
    """The run is done by then."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(finishing, "_reopened_difference", full)
    summary = train_one(tiny_config(tmp_path, max_steps=2, method="full"))
    assert "too little GPU memory" in summary["notes"][-1]


@pytest.mark.parametrize("packing", [True, False])
def test_instruction_tuning(packing, tmp_path):
    """Every token of the data, and nothing else, is counted; only the assistant's count in the loss."""
    changes = {"max_length": 128, "max_steps": -1, "num_train_epochs": 2, "packing": packing, "learning_rate": 3e-3}
    config = tiny_config(tmp_path, data=write_chats(tmp_path / "chats.jsonl"), apex={"stages": 2}, **changes)
    config = dataclasses.replace(config, eval_data=(SourceConfig(str(write_chats(tmp_path / "held_out.jsonl", 4))),))
    summary = train_one(config)
    assert summary["tokens"] == 2 * summary["data"]["tokens"]
    assert 0.1 < summary["data"]["supervised_share"] < 0.8
    assert summary["eval_loss_end"] < summary["eval_loss_start"] - 0.3
    assert summary["fused_max_abs_logit_difference"] == 0


def test_tensorboard(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    _, folder = run_briefly(tmp_path, report_to=("tensorboard",), max_steps=2)
    kept = files_of(folder / "tensorboard")
    assert kept
    _, other = run_briefly(tmp_path / "other", report_to=("tensorboard",), max_steps=2)  # in the same process
    assert files_of(other / "tensorboard") and files_of(folder / "tensorboard") == kept


def test_one_process_of_fsdp2_has_a_control_too(tmp_path):
    one = DistributedConfig(strategy="fsdp2")
    config = tiny_config(tmp_path, distributed=one, control=True, max_steps=2, apex={"stages": 1})
    (tmp_path / "c.yaml").write_text(dump_yaml(config))
    command = [sys.executable, "-m", "graftlm", "train", str(tmp_path / "c.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/control/summary.json").exists()


def test_without_a_checkpoint_a_run_begins_anew_with_other_data(tmp_path):
    """What was interrupted before it kept anything binds nobody."""
    config = tiny_config(tmp_path)

    class Interrupted(run.RunTrainer):
        def begin_run(self):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "RunTrainer", Interrupted)
        train_one(config)
    assert (tmp_path / "run/data.json").exists()
    write_texts(tmp_path / "text.jsonl", documents=4)
    assert train_one(config)["data"]["documents"] == 4


def test_stderr_has_no_bars_of_transformers(tmp_path, capfd):
    run_briefly(tmp_path, save_steps=2)
    shown = capfd.readouterr().err
    assert "step 4/4" in shown
    assert "stage 2 of 2 begins after step " in shown
    assert "it/s" not in shown


@pytest.mark.parametrize("method", ["apex", "full"])
def test_a_lean_run_trains_the_same(method, tmp_path):
    whole, lean = (tiny_config(tmp_path / name, method=method, max_steps=4) for name in ("whole", "lean"))
    summaries = [train_one(whole), train_one(lean, lean=True)]
    kept = [{k: v for k, v in one.items() if k not in ONLY_TIMES} for one in summaries]
    assert kept[0] == kept[1]
    assert "plan" in summaries[0] and "plan" not in summaries[1]
    weights = [load_file(Path(one.output_dir) / "model" / "model.safetensors") for one in (whole, lean)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert "activations.safetensors" not in files_of(Path(lean.output_dir))


def test_a_run_may_write_no_checkpoints(tmp_path):
    """Stages and the end would write some."""
    with_some, without = (tiny_config(tmp_path / str(kept), save_total_limit=kept) for kept in (2, 0))
    for config in (with_some, without):
        train_one(config, resume=False)
    one, other = (Path(config.output_dir) for config in (with_some, without))
    assert list((one / "checkpoints").iterdir()) and not list((other / "checkpoints").glob("*"))
    assert read_metrics(one) == read_metrics(other)
