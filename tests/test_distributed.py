"""Several processes of one run give what one gives, and stop together; here on the CPU, with gloo."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import many_processes
import psutil
import pytest
import torch
from many_processes import launch, relative_difference, run_of, saved_model, spread_config
from safetensors.torch import load_file
from tiny_runs import read_metrics, read_summary, write_chats, write_texts
from transformers import TrainingArguments

from graftlm.configuring import dump_yaml, load_config
from graftlm.errors import UserError
from graftlm.models import load_model
from graftlm.training import distributed, run_trainer
from graftlm.training.arguments import training_arguments
from graftlm.training.checkpoints import list_checkpoints
from graftlm.training.config import DistributedConfig, RunConfig, SourceConfig

BAR = 1e-5
REGIMES = {
    "full": {},
    "half": {"apex": {"trains": "half", "budget": 0.7}},
    "small": {"apex": {"trains": "small", "budget": 0.3}},
    "tokens": {"apex": {"stage_by": "tokens", "stage_length": 3000, "operator_learning_rate": "auto"}},
    "plain": {"method": "full"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder):
    """alone(kind, model) is the folder of a run of one process without a strategy."""
    done: dict[tuple[str, str], Path] = {}

    def get(kind: str = "full", model: str = "tiny-llama") -> Path:
        key = kind, Path(model).name
        if key not in done:
            done[key] = run_of(folder, 1, "none", name=f"alone-{'-'.join(key)}", model=model, **REGIMES[kind])
        return done[key]

    return get


def same(run: Path, reference: Path, without: str = "nothing") -> None:
    """The weights agree to rounding, and what is counted agrees exactly."""
    assert relative_difference(run, reference, without) < BAR
    ours, theirs = read_summary(run), read_summary(reference)
    assert ours["tokens"] == theirs["tokens"]
    assert ours["steps"] == theirs["steps"] == 20
    assert len(ours["stages"]) == len(theirs["stages"])
    for a, b in zip(ours["stages"], theirs["stages"], strict=True):
        for key in ("step", "heads", "channels", "tokens"):
            assert a[key] == b[key], key
        for role, moved in b.get("moved", {}).items():
            assert a["moved"][role] == pytest.approx(moved, rel=1e-2), role
    assert ours["eval_loss_end"] == pytest.approx(theirs["eval_loss_end"], rel=1e-5)
    assert ours["eval_loss_end"] < ours["eval_loss_start"] - 0.01
    for a, b in zip(read_metrics(run), read_metrics(reference), strict=True):
        for key in ("loss", "grad_norm", "tokens", "step"):
            assert (a.get(key) or 0) == pytest.approx(b.get(key) or 0, rel=1e-4), key
    a, b = (load_file(r / "activations.safetensors") for r in (run, reference))
    for key, value in b.items():
        torch.testing.assert_close(a[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "half"])
def test_ddp(kind, folder, alone):
    same(run_of(folder, 2, "ddp", name=f"ddp-{kind}", **REGIMES[kind]), alone(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["small", "tokens", "plain"])
def test_ddp_of_four(kind, folder, alone):
    same(run_of(folder, 4, "ddp", name=f"ddp4-{kind}", **REGIMES[kind]), alone(kind))


def test_fsdp2(folder, alone):
    """Grouped-query attention, tied embeddings, clipping, accumulation, and two changes of the stage."""
    run = run_of(folder, 2, "fsdp2", name="fsdp2")
    same(run, alone())
    assert len(read_summary(run)["stages"]) == 3
    assert read_summary(run)["processes"] == 2
    config = load_model(str(run / "model")).config  # a stock checkpoint
    assert config.architectures == ["LlamaForCausalLM"]
    assert (run / "model" / "model.safetensors").stat().st_size > 100_000
    assert read_summary(run)["fused_max_abs_logit_difference"] < 1e-5


def test_fsdp2_shards_slices(folder, alone):
    """Rows and columns that train lie as their matrices do: queries', keys' and values' rows, biases of theirs, and
    operators whose gradient comes token by token or from gradients of N."""
    model = saved_model(folder / "qwen2", "qwen2")
    run = run_of(folder, 2, "fsdp2", name="fsdp2-half", model=model, **REGIMES["half"])
    same(run, alone("half", model))
    assert load_model(str(run / "model")).config.architectures == ["Qwen2ForCausalLM"]
    assert read_summary(run)["fused_max_abs_logit_difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["full", "half", "small"])
@pytest.mark.parametrize("family", ["qwen2", "phi3", "qwen3"])
def test_fsdp2_families(family, kind, world, folder, alone):
    """Biases of mixed rows (qwen2), fused projections (phi3), norms on queries and keys (qwen3)."""
    model = saved_model(folder / family, family)
    run = run_of(folder, world, "fsdp2", name=f"fsdp2-{family}-{kind}-{world}", model=model, **REGIMES[kind])
    same(run, alone(kind, model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "half", "small", "tokens", "plain"])
def test_fsdp2_of_four(kind, folder, alone):
    same(run_of(folder, 4, "fsdp2", name=f"fsdp2-4-{kind}", **REGIMES[kind]), alone(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind, strategy", [("full", "ddp"), ("full", "fsdp2"), ("half", "fsdp2"), ("small", "fsdp2")])
@pytest.mark.parametrize(
    "setting, value", [("gradient_checkpointing", True), ("torch_compile", True), ("bf16", True), ("dtype", "bfloat16")]
)
def test_settings(setting, value, kind, strategy, folder):
    """With checkpointing and compilation, what one process gives with them; in bfloat16 the loss falls alike."""
    one = run_of(folder, 1, "none", name=f"one-{setting}-{kind}-{strategy}", **{setting: value}, **REGIMES[kind])
    two = run_of(folder, 2, strategy, name=f"{strategy}-{setting}-{kind}", **{setting: value}, **REGIMES[kind])
    if setting not in ("bf16", "dtype"):
        assert relative_difference(two, one) < BAR
    assert read_summary(two)["eval_loss_end"] == pytest.approx(read_summary(one)["eval_loss_end"], rel=0.01)


def streamed(folder: Path, world: int, strategy: str, name: str, kind: str) -> RunConfig:
    """Four passes over a stream whose last block is a short one; conversations are all of other lengths."""
    folder.mkdir(exist_ok=True)
    config = spread_config(folder, world, strategy, name=name, method="full", streaming=True, save_steps=2)
    if kind == "text":
        return dataclasses.replace(config, data=(dataclasses.replace(config.data[0], limit=9),))
    path = folder / "chats.jsonl"
    chats = (SourceConfig(str(path if path.exists() else write_chats(path, 45))),)
    return dataclasses.replace(config, data=chats, eval_data=chats, packing=False, chat_template="chatml")


@pytest.mark.parametrize("kind", ["text", "chats"])
def test_a_stream_is_shared_out(kind, folder):
    """Every step has the sequences that it has with one process, nothing is seen twice; and a run that is stopped goes
    on with them, with the same number of processes or another."""
    configs = [streamed(folder, world, "ddp", f"stream-{kind}-{world}", kind) for world in (1, 2)]
    for world, config in zip((1, 2), configs, strict=True):
        outcomes = launch(folder / "logs", world, many_processes.train, config)
        assert [o.code for o in outcomes] == [0] * world, "\n".join(o.told for o in outcomes)
    one, two = (Path(config.output_dir) for config in configs)
    same(two, one)
    for world, stop_at, resume, code in (
        (2, 7, False, -signal.SIGKILL),
        (2, 11, True, -signal.SIGKILL),
        (1, 21, True, 0),
    ):
        moving = streamed(folder, world, "ddp", f"stream-{kind}-moving", kind)
        outcomes = launch(folder / "logs", world, train_until, moving, resume, stop_at)
        assert {o.code for o in outcomes} == {code}, outcomes
    same(Path(moving.output_dir), one)


@pytest.mark.slow
def test_control_follows_in_the_same_processes(folder):
    config = dataclasses.replace(spread_config(folder, 2, "fsdp2", name="controlled", max_steps=6), control=True)
    (folder / "controlled.yaml").write_text(dump_yaml(config))
    done = torchrun(folder / "controlled.yaml", 2)
    assert done.returncode == 0, done.stderr
    summary = read_summary(folder / "controlled")
    assert summary["control"]["method"] == "full"
    assert summary["control"]["tokens"] == summary["tokens"]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def train_until(config, resume, stop_at):
    """Killed at the first micro-batch after `stop_at` steps."""
    inner = run_trainer.RunTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, *args, **kwargs)

    run_trainer.RunTrainer.training_step = training_step
    many_processes.train(config, resume)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_goes_on_with_another_number_of_processes(strategy, folder, alone):
    """1 -> 2 -> 1, from checkpoints inside a stage."""
    name = f"moving-{strategy}"
    for world, stop_at, resume in ((1, 5, False), (2, 11, True)):
        config = spread_config(folder, world, strategy, name=name, save_steps=2)
        outcomes = launch(folder / "logs", world, train_until, config, resume, stop_at)
        assert {o.code for o in outcomes} == {-signal.SIGKILL}, outcomes
        assert list_checkpoints(folder / name)[-1].name == f"step-{stop_at - 1}"
    same(run_of(folder, 1, strategy, name=name, save_steps=2, resume=True), alone())


def test_slices_go_on_with_another_number_of_processes(folder, alone):
    """2 -> 1, inside a stage; and with the same number, bit for bit what a run does that was left alone."""
    model = saved_model(folder / "qwen2-moving", "qwen2")
    kept = {"model": model, "save_steps": 2, **REGIMES["half"]}
    config = spread_config(folder, 2, "fsdp2", name="moving-half", **kept)
    outcomes = launch(folder / "logs", 2, train_until, config, False, 9)
    assert {o.code for o in outcomes} == {-signal.SIGKILL}, outcomes
    shutil.copytree(folder / "moving-half", folder / "staying-half")
    run = run_of(folder, 1, "fsdp2", name="moving-half", resume=True, **kept)
    same(run, alone("half", model))
    config = dataclasses.replace(config, output_dir=str(folder / "staying-half"))
    (folder / "staying-half" / "config.yaml").write_text(dump_yaml(config))
    run = run_of(folder, 2, "fsdp2", name="staying-half", resume=True, **kept)
    assert relative_difference(run, run_of(folder, 2, "fsdp2", name="unbroken-half", **kept)) == 0


def test_checkpoint_of_another_strategy_or_batch(folder, alone):
    config = spread_config(folder, 2, "fsdp2", name="refused", save_steps=2)
    launch(folder / "logs", 2, train_until, config, False, 3)
    other = spread_config(folder, 2, "ddp", name="refused", save_steps=2)
    told = launch(folder / "logs", 2, many_processes.train, other, True)
    assert [o.code for o in told] == [2, 2]
    assert "written under fsdp2, and distributed.strategy is now another" in told[0].told
    larger = spread_config(folder, 1, "fsdp2", name="refused", save_steps=2, per_device_train_batch_size=8)
    (outcome,) = launch(folder / "logs", 1, many_processes.train, larger, True)
    assert "a step had 8 sequences and would now have 16" in outcome.told
    assert load_config(folder / "refused" / "config.yaml").per_device_train_batch_size == 2  # it can go on as before


# -- errors -----------------------------------------------------------------------------------------------------------


def refused(folder: Path, world: int, *configs) -> str:
    """The one line that the first process tells when `configs` (one, or one a process) cannot be run."""
    each = [(config,) for config in (configs if len(configs) > 1 else configs * world)]
    outcomes = launch(folder / "logs", world, many_processes.train, each=each)
    assert [o.code for o in outcomes] == [2] * world, "\n".join(o.told for o in outcomes)
    lines = [[line for line in o.told.splitlines() if line.startswith("graftlm: ")] for o in outcomes]
    assert [len(found) for found in lines] == [1] + [0] * (world - 1)
    return lines[0][0]


def test_processes_without_a_strategy(folder):
    assert "2 processes were launched; set distributed.strategy=ddp" in refused(
        folder, 2, spread_config(folder, 2, "none", name="none")
    )


def test_processes_that_do_not_divide(folder):
    config = spread_config(folder, 1, "fsdp2", name="three")
    line = refused(folder, 3, config)
    assert "fsdp2 shards model.layers.0.self_attn.v_proj [32, 64] along its dimension 1" in line
    assert "3 processes do not divide 64 evenly" in line


def test_processes_with_other_settings_or_data(folder):
    config = spread_config(folder, 2, "ddp", name="differ")
    line = refused(folder, 2, config, dataclasses.replace(config, learning_rate=5e-4))
    assert "the settings differ" in line
    assert "learning_rate is 0.001 in process 0 and 0.0005 in process 1" in line
    # The same configuration on machines whose files differ: each process stands in a folder of its own.
    for number in (0, 1):
        (folder / f"machine-{number}").mkdir()
        write_texts(folder / f"machine-{number}" / "text.jsonl", 5 + number)
    source = dataclasses.replace(config.data[0], path="text.jsonl")
    config = dataclasses.replace(config, data=(source,), cache_dir=None, output_dir=str(folder / "elsewhere"))
    outcomes = launch(folder / "logs", 2, train_in, each=[(config, folder / f"machine-{i}") for i in (0, 1)])
    assert [o.code for o in outcomes] == [2, 2]
    assert "the training data differ between the processes" in outcomes[0].told


def train_in(config, folder):
    os.chdir(folder)
    os.environ["GRAFTLM_CACHE"] = str(folder / "cache")
    many_processes.train(config)


def bare(config):
    inner = run_trainer.RunTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        assert model is self.model and not torch.distributed.is_initialized()
        return inner(self, model, *args, **kwargs)

    run_trainer.RunTrainer.training_step = training_step
    many_processes.train(config)


@pytest.mark.parametrize("strategy", ["none", "ddp"])
def test_one_launched_process_is_as_one_without_a_launcher(strategy, folder):
    (outcome,) = launch(
        folder / "logs", 1, bare, spread_config(folder, 1, strategy, name=f"bare-{strategy}", max_steps=3)
    )
    assert outcome.code == 0, outcome.told


def test_one_process_takes_one_gpu(monkeypatch, folder):
    """Trainer would take all that it sees, by nn.DataParallel."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: vars(self)["_n_gpu"] or 4))
    assert training_arguments(spread_config(folder, 1, "none")).n_gpu == 1


def test_a_strategy_that_this_torch_lacks(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    with pytest.raises(UserError, match="fsdp2 needs gloo, which this torch"):
        distributed.join(DistributedConfig("fsdp2"))


def poisoned(config):
    """The second process's loss is NaN in the fourth step."""
    inner = run_trainer.RunTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = inner(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 and os.environ["RANK"] == "1" else loss

    run_trainer.RunTrainer.compute_loss = compute_loss
    many_processes.train(config)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_nan_in_one_process_stops_all_before_the_step(strategy, folder):
    config = spread_config(folder, 2, strategy, name=f"nan-{strategy}", save_steps=1)
    outcomes = launch(folder / "logs", 2, poisoned, config)
    assert [o.code for o in outcomes] == [2, 2], outcomes
    assert "the loss is NaN or Inf at step 4" in outcomes[0].told
    assert list_checkpoints(folder / f"nan-{strategy}")[-1].name == "step-3"


def torchrun(config: Path, world: int, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(_command(config, world, *arguments), capture_output=True, text=True, timeout=300)


def _command(config: Path, world: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return [*launcher, "-m", "graftlm", "train", str(config), *arguments]


def test_one_process_dies(folder, alone):
    """Under torchrun the others stop within seconds, the last checkpoint stands, and --resume ends like a run that was
    left alone."""
    config = spread_config(folder, 2, "fsdp2", name="dying", save_steps=1, save_total_limit=50)
    (folder / "dying.yaml").write_text(dump_yaml(config))
    with (folder / "dying.log").open("w") as log:
        process = subprocess.Popen(_command(folder / "dying.yaml", 2), stdout=log, stderr=log)
        _wait_for(lambda: len(list_checkpoints(folder / "dying")) >= 3, 120)
        victim = next(p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1")
        victim.kill()
        died = time.monotonic()
        assert process.wait(60) != 0
    seconds = time.monotonic() - died
    assert seconds < 40, seconds
    assert "exitcode  : -9" in (folder / "dying.log").read_text()
    last = list_checkpoints(folder / "dying")[-1].name
    assert 3 <= int(last.removeprefix("step-")) < 20
    same(run_of(folder, 2, "fsdp2", name="dying", save_steps=1, save_total_limit=50, resume=True), alone())


def _wait_for(there, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_accelerate_launch(folder, alone):
    config = spread_config(folder, 2, "fsdp2", name="accelerated")
    (folder / "accelerated.yaml").write_text(dump_yaml(config))
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    assert accelerate is not None
    command = [accelerate, "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    command += ["--dynamo_backend=no", "-m", "graftlm", "train", str(folder / "accelerated.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    same(folder / "accelerated", alone())
