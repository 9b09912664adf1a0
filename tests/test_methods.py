"""The contract between RunTrainer and another way of training: what is called, when, and what it sees then."""

import json
from typing import get_args, get_type_hints

import pytest
import torch
from tiny_runs import assert_same_run, interrupted, read_metrics, tiny_config
from transformers import AutoModelForCausalLM

from graftlm.anatomy import read_anatomy
from graftlm.configuring import load_config
from graftlm.errors import UserError
from graftlm.methods import METHODS, make_method
from graftlm.methods.adapter_settings import LoraSettings
from graftlm.methods.base import Method
from graftlm.models import load_model
from graftlm.training import run
from graftlm.training.config import DistributedConfig, RunConfig
from graftlm.training.run import train_one

STEPS = 4


def outputs(model) -> set[str]:
    """Names of the FFNs' last weights."""
    return {f"{m.module}.weight" for b in read_anatomy(model).of_kind("channels") for m in b.mixed if m.role == "down"}


class Story(Method):
    """Trains a few tensors of its own choice, and remembers what happened."""

    told: list

    def __init__(self, model, config):
        super().__init__(model, config)
        self.told = []
        self.counter = torch.zeros(())

    def trained(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def prepare(self):
        chosen = outputs(self.model)
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in chosen)
        self.told.append("prepare")

    def look(self, batches):
        state = torch.random.get_rng_state()
        seen = list(batches(5))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert sum(len(batch["input_ids"]) for batch in seen) == 5
        assert all(batch["labels"].shape == batch["input_ids"].shape for batch in seen)
        assert all(torch.isfinite(self.model(**batch).loss) for batch in seen)
        self.told.append("look")

    def load_state_dict(self, state):
        self.counter = state["counter"]
        self.told.append(f"load {int(self.counter)}")

    def start(self, optimizer, total_steps):
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in self.trained()}
        assert not optimizer.state
        self.told.append(f"start {total_steps}")

    def rate_factor(self, step):
        return 0.5 if step == 2 else 1.0

    def after_backward(self):
        assert all(p.grad is not None for p in self.trained())
        self.told.append("backward")

    def after_step(self, step):
        assert all(p.grad is None for p in self.model.parameters())
        self.counter = self.counter + 1
        self.told.append(f"step {step}")

    def state_dict(self):
        self.told.append("save")
        return {"counter": self.counter}

    def finish(self):
        for p in self.model.parameters():
            p.requires_grad_(True)
        self.told.append("finish")

    @property
    def notes(self):
        return ["a story"]


class Frozen(Story):
    """Takes every gradient away before the optimizer sees it."""

    def after_backward(self):
        for p in self.trained():
            p.grad = None


def settings(folder, **changes):
    lora = LoraSettings(rank=2)  # what the plan is of
    return tiny_config(folder, **{"method": "lora", "lora": lora, "max_steps": STEPS, "save_steps": 2, **changes})


@pytest.fixture
def story(monkeypatch):
    """story(kind) puts methods of that class into runs; returns those made, newest last."""

    def use(kind=Story):
        made = []
        monkeypatch.setattr(run, "make_method", lambda *args: made.append(kind(*args)) or made[-1])
        return made

    return use


def test_what_is_called_and_when(story, tmp_path):
    made = story()
    summary = train_one(settings(tmp_path))
    assert made[0].told == [
        "prepare", "look", "start 4",
        "backward", "step 1", "backward", "step 2", "save", "backward", "step 3", "backward", "step 4", "save",
        "finish",
    ]  # fmt: skip
    model = load_model("tiny-llama")
    expected = sum(model.get_parameter(name).numel() for name in outputs(model))
    assert summary["trainable_parameters"] == expected
    assert summary["trainable_fraction"] == expected / sum(p.numel() for p in model.parameters())
    assert summary["method"] == "lora" and "a story" in summary["notes"]
    assert summary["fused_max_abs_logit_difference"] == 0


def test_preparing_counts_as_time_of_training(story, tmp_path, monkeypatch):
    """A method may work out the singular vectors of all matrices there."""
    trainers, seconds = [], []

    class Kept(run.RunTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    class Watching(Story):
        def prepare(self):
            seconds.append(trainers[0].meter.seconds)
            super().prepare()

        def look(self, batches):
            seconds.append(trainers[0].meter.seconds)

    monkeypatch.setattr(run, "RunTrainer", Kept)
    story(Watching)
    train_one(settings(tmp_path, max_steps=1))
    assert seconds[0] == 0 < seconds[1]


def test_what_trains_and_nothing_else(story, tmp_path):
    story()
    train_one(settings(tmp_path))
    given = load_model("tiny-llama")
    before, chosen = given.state_dict(), outputs(given)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert before.keys() == after.keys() > chosen
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (name not in chosen), name


def test_gradients_are_taken_before_the_optimizer(story, tmp_path):
    story(Frozen)
    train_one(settings(tmp_path))
    before = load_model("tiny-llama").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_rates_are_scaled(story, tmp_path):
    story()
    train_one(settings(tmp_path, lr_scheduler_type="constant", warmup_ratio=0.0))
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run") if line["event"] == "train"]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 1e-3])


def test_a_resumed_run(story, tmp_path):
    made = story()
    whole, broken = settings(tmp_path / "a"), settings(tmp_path / "b")
    train_one(whole)
    interrupted(broken, 3)
    train_one(broken, resume=True)
    assert made[2].told == [
        "prepare", "load 2", "start 4", "backward", "step 3", "backward", "step 4", "save", "finish",
    ]  # fmt: skip
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")


@pytest.mark.slow
def test_control_beside_a_method(story, tmp_path):
    """The same tokens, trained plainly."""
    run.train(settings(tmp_path, control=True, max_steps=2))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["method"], summary["control"]["method"]) == ("lora", "full")
    assert summary["control"]["tokens"] == summary["tokens"] and summary["stages"] == []
    report = (tmp_path / "run" / "report.html").read_text()
    assert "LoRA" in report and "plain training" in report


def test_report_and_card_say_which_method(story, tmp_path):
    story()
    run.train(settings(tmp_path, max_steps=2, apex={"k_heads": 0.125}))
    report = (tmp_path / "run" / "report.html").read_text()
    assert "LoRA" in report and "lora.rank" in report  # among what differs from the defaults
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "trained with LoRA" in card
    for text in (report, card):
        assert "APEX" not in text and "Advantageous" not in text


@pytest.mark.parametrize("method", METHODS)
def test_fsdp2_is_refused(method, tmp_path):
    with pytest.raises(UserError, match=f"distributed.strategy: fsdp2 cannot shard method: {method}; use ddp or none$"):
        settings(tmp_path, method=method, distributed=DistributedConfig("fsdp2"))


def test_a_wrong_name_says_the_nearest(tmp_path):
    (tmp_path / "c.yaml").write_text("model: tiny-llama\ndata: x.txt\nmethod: loar\n")
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "c.yaml")
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/c.yaml:3: method: 'loar' must be lora (the nearest), or one of apex, full, ")
    assert line.split(", ").count("lora") == 0 and "relora" in line  # each of them once
    with pytest.raises(UserError, match=r"method: 'xyz' must be one of apex, full, lora, "):
        load_config(None, ["method=xyz"], model="m", data="d")


def test_every_method_of_the_config_can_be_made(tmp_path):
    names = set(get_args(get_type_hints(RunConfig)["method"]))
    assert names == {"apex", "full", *METHODS}
    for name in names:
        made = make_method(load_model("tiny-llama"), settings(tmp_path, method=name))
        assert (made is None) == (name in ("apex", "full"))
        assert made is None or made.config.method == name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_name_for_people(method):
    from graftlm.reporting.figures import method_name

    assert method_name(method) != method
    assert method_name(method).lower().replace("-", "_").replace("²", "2") == method
