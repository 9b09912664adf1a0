"""APEX inside Hugging Face's Trainer: the same numbers as in a loop written by hand."""

import contextlib
import copy
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from many_processes import launch
from tiny_models import tiny_model
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.checkpointing import APEX_FILE
from graftlm.errors import UserError
from graftlm.training.data.collate import Collator
from graftlm.training.trainer import ApexTrainer

ACCUMULATION = 2
APEX = {"stages": 2, "k_heads": 0.25, "k_channels": 0.25, "assess_samples": 6}


def ragged(rows: int = 22, seed: int = 3) -> list[dict[str, np.ndarray]]:
    """Sequences of 4 to 16 tokens, of which some do not count in the loss. 22 rows by twos are 11 batches, so that the
    last step of an epoch has one micro-batch instead of two."""
    random = np.random.default_rng(seed)
    items = []
    for length in random.integers(4, 17, rows):
        ids = random.integers(3, 64, length)
        labels = np.where(random.random(length) < 0.7, ids, -100)
        labels[-1] = ids[-1]
        items.append({"input_ids": ids, "labels": labels})
    return items


def arguments(folder: Path, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 9,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "optim": "adamw_torch",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
        "remove_unused_columns": False,
    }
    return TrainingArguments(**{**settings, **changes})


class Noting(ApexTrainer):
    """Keeps every micro-batch and every learning rate of a step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []
        trainer = self

        class Rates(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **_):
                trainer.rates.append(trainer.optimizer.param_groups[0]["lr"])

        self.add_callback(Rates())

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen.append({k: v.clone() for k, v in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.state.log_history if "loss" in entry]


def make(folder: Path, model, apex: dict | None = None, kind=Noting, **changes) -> Noting:
    return kind(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=ragged(),
        data_collator=Collator(0),
        apex=ApexConfig(**{**APEX, **apex}) if apex is not None else None,
    )


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def distance(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """Between all weights, relative by the norm."""
    ours, theirs = (torch.cat([v.double().flatten() for v in m.state_dict().values()]) for m in (a, b))
    return float((ours - theirs).norm() / theirs.norm())


def by_hand(model, trainer: Noting, config: ApexConfig, autocast=contextlib.nullcontext) -> list[float]:
    """The micro-batches that `trainer` saw, in a plain PyTorch loop; returns the loss of every step."""
    args = trainer.args
    apex = Apex(model, config, total_steps=args.max_steps)
    decayed = set(trainer.get_decay_parameter_names(model))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in named if name in decayed], "weight_decay": args.weight_decay},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )
    with autocast():
        apex.start(optimizer, assess_on=trainer.assessment_batches(config.assess_samples))
    model.train()
    batches, losses = list(trainer.seen), []
    for step, rate in enumerate(trainer.rates):
        micro = batches[:1] if (step + 1) % 6 == 0 else batches[:ACCUMULATION]  # 11 batches are 5 steps of 2, 1 of 1
        batches = batches[len(micro) :]
        valid = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro)
        total = 0.0
        for batch in micro:
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            with autocast():
                logits = model(**inputs).logits
            logits = logits.float()  # as transformers does, float64 included
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
            loss = loss / valid
            if (penalty := apex.penalty()) is not None:
                loss = loss + penalty / len(micro)
            loss.backward()
            total += float(loss.detach())
        apex.pull_back()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        apex.advance()
        losses.append(total)
    assert not batches
    apex.finish()
    return losses


@pytest.mark.parametrize(
    "apex",
    [
        {},
        {"trains": "small", "budget": 0.3, "share_operators": False},
        {"trains": "half", "budget": 0.8, "operator_learning_rate": "auto"},
        {"authors_diagonals": True, "activation_regularization": 0.1},
    ],
    ids=["full", "small", "half", "diagonals"],
)
def test_equals_a_loop_written_by_hand(apex, tmp_path):
    """Accumulation, clipping, decay, schedule, a partial step and labels that do not count, over a stage boundary."""
    model = tiny_model("llama", torch.float64)
    other = copy.deepcopy(model)
    trainer = make(tmp_path, model, apex)
    trainer.train()
    losses = by_hand(other, trainer, trainer.apex.config)
    assert len(trainer.apex.clock.starts) == 2
    assert losses == pytest.approx(trainer.losses, rel=1e-6)  # Trainer sums them in float32
    assert distance(model, other) < 1e-10
    assert distance(model, tiny_model("llama", torch.float64)) > 1e-2


def test_bfloat16_autocast_equals_a_loop_written_by_hand(tmp_path):
    model = tiny_model("llama")
    other = copy.deepcopy(model)
    trainer = make(tmp_path, model, {}, bf16=True)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in model.parameters())

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    losses = by_hand(other, trainer, trainer.apex.config, autocast)
    assert losses == pytest.approx(trainer.losses, rel=1e-5)
    assert distance(model, other) < 1e-5


@pytest.mark.parametrize("apex", [{}, {"trains": "small", "budget": 0.3}, {"activation_regularization": 0.1}])
def test_activation_checkpointing_changes_nothing(apex, tmp_path):
    runs = []
    for checkpointing in (False, True):
        trainer = make(tmp_path, tiny_model(), apex, activation_checkpointing=checkpointing)
        trainer.train()
        runs.append(trainer)
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-6)
    assert distance(runs[0].model, runs[1].model) < 1e-6
    for name in runs[0].apex.recorder.votes:
        assert torch.equal(runs[0].apex.recorder.votes[name], runs[1].apex.recorder.votes[name])
        assert runs[0].apex.recorder.samples[name] == runs[1].apex.recorder.samples[name] > 0


def test_without_apex_it_is_transformers_trainer(tmp_path):
    trainers = []
    for kind in (Trainer, ApexTrainer):
        extra = {"apex": None} if kind is ApexTrainer else {}
        trainer = kind(
            model=tiny_model(),
            args=arguments(tmp_path),
            train_dataset=ragged(),
            data_collator=Collator(0),
            **extra,
        )
        trainer.train()
        trainers.append(trainer)
    stock, ours = trainers
    assert same_weights(stock.model, ours.model)
    assert [e.get("loss") for e in stock.state.log_history] == [e.get("loss") for e in ours.state.log_history]


def test_operators_that_do_not_move_change_nothing(tmp_path):
    """With an operator learning rate of nothing, APEX is plain training, bit for bit. (Without clipping: operators
    have gradients all the same, and those are part of the norm.)"""
    expanded = make(tmp_path, tiny_model(), {"operator_learning_rate": 1e-30}, max_grad_norm=0.0)
    expanded.train()
    assert max(float(tie.operator.R.detach().abs().max()) for tie in expanded.apex.ties) > 0
    plain = make(tmp_path, tiny_model(), max_grad_norm=0.0)
    plain.train()
    assert same_weights(expanded.model, plain.model)


def digest(batch: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("assessment", ["rank", "random"])
def test_the_control_sees_the_same_batches_in_the_same_order(assessment, tmp_path):
    seen = []
    for apex in ({"assessment": assessment}, None):
        trainer = make(tmp_path, tiny_model(attention_dropout=0.1), apex, max_steps=-1, num_train_epochs=2)
        trainer.train()
        seen.append([digest(batch) for batch in trainer.seen])
    assert len(seen[0]) == 22
    assert seen[0] == seen[1]
    assert seen[0][:11] != seen[0][11:]  # each epoch has an order of its own


@pytest.mark.parametrize(
    "apex",
    [
        {"stages": 3, "stage_learning_rates": (1e-2, 4e-3, 1e-3)},
        {"stages": 3, "rewarmup_ratio": 0.25},
        {"stages": 3, "rewarmup_ratio": 0.25, "stage_learning_rates": (1e-2, 4e-3, 1e-3)},
        {"stages": 3, "stage_by": "tokens", "stage_length": 70, "stage_learning_rates": (1e-2, 4e-3, 1e-3)},
        {"stages": 2},
    ],
)
def test_the_control_follows_the_learning_rate(apex, tmp_path):
    expanded = make(tmp_path, tiny_model(), apex)
    expanded.train()
    control = make(tmp_path, tiny_model())
    control.schedule_config, control.stage_starts = expanded.apex.config, expanded.apex.clock.starts
    control.train()
    assert len(expanded.apex.clock.starts) == apex["stages"]
    assert len(expanded.rates) == 9
    assert len(set(expanded.rates)) > 2
    assert expanded.rates == control.rates


# --- transformers' own checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "apex",
    [
        {"operator_learning_rate": "auto", "stage_learning_rates": (1e-2, 1e-3)},
        {"trains": "small", "budget": 0.3, "rewarmup_ratio": 0.2},
    ],
    ids=["full", "small"],
)
@pytest.mark.parametrize("step", [3, 4, 6])
def test_resumes_from_transformers_checkpoint(apex, step, tmp_path):
    """The first stage ends after step 4, the first epoch after step 6."""
    model = tiny_model(attention_dropout=0.1)
    whole = make(tmp_path / "whole", copy.deepcopy(model), apex)
    whole.train()
    begun = make(tmp_path / "begun", copy.deepcopy(model), apex, kind=Stopping, save_strategy="steps", save_steps=step)
    begun.train()
    assert begun.state.global_step == step
    assert (tmp_path / "begun" / f"checkpoint-{step}" / APEX_FILE).is_file()
    resumed = make(tmp_path / "begun", copy.deepcopy(model), apex)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.rates == whole.rates[step:]
    assert resumed.apex.clock.starts == whole.apex.clock.starts
    for name, votes in whole.apex.recorder.votes.items():
        assert torch.equal(resumed.apex.recorder.votes[name], votes)
    assert same_weights(resumed.model, whole.model)


def test_ddp_saves_and_goes_on(tmp_path):
    """Apex's state is summed over the processes: all of them must take part in saving it."""
    outcomes = launch(tmp_path / "logs", 2, _save_and_go_on, tmp_path)
    assert [one.code for one in outcomes] == [0, 0], "\n".join(one.told for one in outcomes)
    assert (tmp_path / "run" / "checkpoint-2" / APEX_FILE).is_file()


def _save_and_go_on(folder):
    for resume in (False, True):
        trainer = make(folder / "run", tiny_model(), {}, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2") if resume else None)
        assert trainer.state.global_step == 4


class Stopping(Noting):
    """Stops at its first checkpoint, as a time limit would make it."""

    def _save_checkpoint(self, *args, **kwargs):
        super()._save_checkpoint(*args, **kwargs)
        self.control.should_training_stop = True


def test_a_checkpoint_without_apex_is_refused(tmp_path):
    trainer = make(tmp_path, tiny_model(), {}, save_strategy="steps", save_steps=3)
    trainer.train()
    (tmp_path / "checkpoint-9" / APEX_FILE).unlink()
    with pytest.raises(UserError, match=rf"checkpoint-9/{APEX_FILE}: no such file; delete the checkpoint"):
        make(tmp_path, tiny_model(), {}).train(resume_from_checkpoint=True)


def test_an_optimizer_made_before_the_operators_is_refused(tmp_path):
    model = tiny_model()
    trainer = ApexTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=ragged(),
        data_collator=Collator(0),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
        apex=ApexConfig(**APEX),
    )
    with pytest.raises(UserError, match="leave it to Trainer"):
        trainer.train()


def test_after_training_the_model_is_an_ordinary_one(tmp_path):
    trainer = make(tmp_path, tiny_model(), {})
    trainer.train()
    assert trainer.model.state_dict().keys() == tiny_model().state_dict().keys()
    assert [name for name, _ in trainer.model.named_parameters()] == [
        name for name, _ in tiny_model().named_parameters()
    ]
    assert not trainer.model._forward_hooks
    with pytest.raises(UserError, match="make a new trainer"):
        trainer.train()


@pytest.mark.slow
def test_torch_compile(tmp_path):
    """Compiled, it is the same training; the compiler only rounds differently."""
    runs = []
    for compiled in (False, True):
        trainer = make(tmp_path, tiny_model(num_hidden_layers=1), {}, torch_compile=compiled, max_steps=6)
        trainer.train_dataset = [{key: np.resize(row[key], 12) for key in row} for row in ragged()]
        trainer.train()
        runs.append(trainer)
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-4)
    for name, votes in runs[0].apex.recorder.votes.items():
        assert torch.equal(runs[1].apex.recorder.votes[name], votes)
    assert distance(runs[0].model, runs[1].model) < 1e-3
