"""The trainer that `graftlm train` runs on: it measures, stops on NaN, and saves so that a kill loses nothing."""

import contextlib
import math
import random
import shutil
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftlm.activations import count_tokens
from graftlm.apex import Apex
from graftlm.checkpointing import (
    check_tensors,
    load_optimizer,
    load_tensors_and_metadata,
    save_optimizer,
    save_tensors,
)
from graftlm.errors import UserError
from graftlm.files import atomic_folder, read_json
from graftlm.models import quiet_transformers
from graftlm.training.metrics import Display, MetricsLog
from graftlm.training.trainer import APEX_FILE, ApexTrainer

OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
STATE_FILE = "trainer_state.json"


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean cross-entropy in nats over all supervised tokens of `batches`; the model's mode is put back."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        inputs = {k: v.to(device) for k, v in batch.items()}
        supervised = int((inputs["labels"][:, 1:] != -100).sum())
        if supervised:
            total += float(model(**inputs, use_cache=False).loss) * supervised
            count += supervised
    model.train(was_training)
    return total / count if count else float("nan")


class _Recording(TrainerCallback):
    """Writes metrics, asks for evaluations and checkpoints, and stops before a step on NaN or Inf."""

    def __init__(self, trainer: "RunTrainer"):
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self._trainer
        if state.global_step == 0:
            trainer.begin_run()
        trainer.display.start(state.global_step, state.max_steps)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.clock_in()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # After clipping: a norm of NaN makes every gradient NaN, and one of Inf makes NaN of what was Inf.
        gradients = [p.grad for p in self._trainer.model.parameters() if p.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            self._trainer.refuse("a gradient")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self._trainer
        trainer.clock_out()
        trainer.display.step(state.global_step)
        step = state.global_step
        due = step in trainer.eval_at or (trainer.eval_every and step % trainer.eval_every == 0)
        if due and step < state.max_steps:
            trainer.evaluate_now("periodic")
        # The last step too: whatever then goes wrong with saving the model (a full disk), the training is not lost.
        if step == state.max_steps or (trainer.save_every and step % trainer.save_every == 0):
            control.should_save = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self._trainer.log_training(logs)


class RunTrainer(ApexTrainer):
    """Counts tokens and seconds of training (evaluation and saving apart), and keeps the story of its stages."""

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *args: Any,
        run: Path,
        evaluation: Any,
        evaluation_batch_size: int,
        display: Display,
        eval_every: int = 0,
        eval_at: Sequence[int] = (),
        save_every: int = 0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.run = run
        self.evaluation = evaluation
        self.evaluation_batch_size = evaluation_batch_size
        self.display = display
        self.eval_every, self.eval_at, self.save_every = eval_every, eval_at, save_every
        self.metrics: MetricsLog | None = None
        self.tokens = 0
        self.seconds = 0.0
        self.eval_loss_start: float | None = None
        self.stages: list[dict[str, Any]] = []
        self._clock: float | None = None
        self._loss = 0.0
        """Sum of the losses of all steps."""
        self._logged = (0, 0, 0.0, 0.0)
        """Step, tokens, seconds and sum of losses when metrics were last logged."""
        self.remove_callback(PrinterCallback)  # Display says it better
        # Before the mixin's own: a step's time is taken before a stage ends, and saving is asked for after.
        self.callback_handler.callbacks.insert(0, _Recording(self))

    # -- measuring ------------------------------------------------------------------------------------------------

    def clock_in(self) -> None:
        self._clock = time.perf_counter()

    def clock_out(self) -> None:
        if self._clock is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self._clock
            self._clock = None

    @contextlib.contextmanager
    def timed(self) -> Any:
        """Count what happens inside as time of training."""
        self.clock_in()
        try:
            yield
        finally:
            self.clock_out()

    def batches(self, data: Any, size: int) -> Iterable[dict[str, Tensor]]:
        for start in range(0, len(data), size):
            yield self.data_collator([data[i] for i in range(start, min(start + size, len(data)))])

    def evaluate_now(self, when: str) -> float | None:
        """Held-out loss now, written to metrics.jsonl; None without evaluation data."""
        if self.evaluation is None or len(self.evaluation) == 0:
            return None
        with self.compute_loss_context_manager():
            loss = mean_loss(self.model, self.batches(self.evaluation, self.evaluation_batch_size))
        self._write(event="eval", when=when, loss=loss, stage=self.apex.clock.stage if self.apex is not None else 0)
        training_log_due = self.control.should_log
        self.log({"eval_loss": loss})
        self.control.should_log = training_log_due  # Trainer takes any log for the one that was due
        return loss

    def _write(self, *, stage: int, **values: Any) -> None:
        assert self.metrics is not None
        position = {"step": self.state.global_step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
        self.metrics.write(**values, **position, stage=stage)

    def log_training(self, logs: Mapping[str, float]) -> None:
        now = (self.state.global_step, self.tokens, self.seconds, self._loss)
        steps, tokens, seconds, losses = (new - old for new, old in zip(now, self._logged, strict=True))
        self._logged = now
        rate = tokens / seconds if seconds > 0 else 0.0
        loss = losses / steps  # not Trainer's, which knows nothing of steps before a resume
        step, total = self.state.global_step, self.state.max_steps
        # The stage that the step was taken in: another may have begun since.
        stage = bisect_left(self.apex.clock.starts, step) - 1 if self.apex is not None else 0
        self._write(
            event="train",
            loss=loss,
            learning_rate=logs.get("learning_rate"),
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=round(rate, 1),
            stage=stage,
        )
        self.display.figures(step, total, loss, rate, self.seconds / max(1, step) * (total - step))

    # -- the story of a run ---------------------------------------------------------------------------------------

    def assess(self, apex: Apex) -> None:
        self.display.say(f"assessing {apex.config.assess_samples} sequences before training")
        with self.timed():
            super().assess(apex)

    def begin_run(self) -> None:
        assert self.metrics is not None
        self.metrics.rewind(0)
        self.eval_loss_start = self.evaluate_now("start")
        if self.apex is not None:
            self._tell_stage(self.eval_loss_start)

    def _tell_stage(self, loss: float | None) -> None:
        assert self.apex is not None
        story: dict[str, Any] = {
            "stage": self.apex.clock.stage,
            "step": self.apex.clock.step,
            "tokens": self.tokens,
            "heads": {},
            "channels": {},
            "eval_loss_start": loss,
            "effective_k": self.apex.effective_k,
        }
        for block in self.apex.anatomy.blocks:
            choice = self.apex.choices[block.name]
            story[block.kind][str(block.layer)] = {
                "advantageous": choice.advantageous.tolist(),
                "disadvantageous": choice.disadvantageous.tolist(),
            }
        self.stages.append(story)

    def next_stage(self) -> None:
        assert self.apex is not None
        self.end_stage("before_fusion")
        with self.timed():
            super().next_stage()
        loss = self.evaluate_now("after_fusion")
        self.stages[-1]["eval_loss_after_fusion"] = loss
        self._tell_stage(loss)
        self.display.say(f"stage {self.apex.clock.stage + 1} of {self.apex.config.stages} begins")
        self.control.should_save = True

    def end_stage(self, when: str) -> float | None:
        """Evaluate before fusion and close the stage's story."""
        loss = self.evaluate_now(when)
        if self.stages:
            self.stages[-1]["eval_loss_before_fusion"] = loss
            self.stages[-1]["steps"] = self.state.global_step - self.stages[-1]["step"]
        return loss

    def end_apex(self) -> None:
        """Left to run.py, which evaluates before and after the last fusion."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.tokens += count_tokens(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        value = float(loss)
        if not math.isfinite(value):
            self.refuse("the loss")
        self._loss += value
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # resumed from the last step's checkpoint: Trainer would take one step more before it sees that
            self.control.should_training_stop = True

    def refuse(self, what: str) -> None:
        raise UserError(
            f"{what} is NaN or Inf at step {self.state.global_step + 1} of {self.run}; the step was not taken: lower "
            "learning_rate, or look at the data (graftlm data); --resume goes on from the last checkpoint"
        )

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Everything of this moment, in one folder that is there whole or not at all."""
        folder = self.run / "checkpoints" / f"step-{self.state.global_step}"
        assert self.metrics is not None
        with atomic_folder(folder) as temporary:
            with quiet_transformers():
                self.model.save_pretrained(temporary)
            scheduler = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
            told = {
                "tokens": self.tokens,
                "seconds": self.seconds,
                "stages": self.stages,
                "eval_loss_start": self.eval_loss_start,
                "loss": self._loss,
                "logged": list(self._logged),
                "metrics_bytes": self.metrics.size,
            }
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            save_optimizer(temporary / OPTIMIZER_FILE, optimizer, {"scheduler": scheduler, "run": told})
            _save_random_state(temporary / RANDOM_FILE)
            if self.apex is not None:
                save_tensors(temporary / APEX_FILE, self.apex.state_dict())
            self.state.save_to_json(str(temporary / STATE_FILE))
        for old in list_checkpoints(self.run)[: -(self.args.save_total_limit or 1)]:
            shutil.rmtree(old)

    def save_apex(self, checkpoint: str) -> None:
        """Done: it is part of _save_checkpoint, so that a checkpoint is whole or not there."""

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with quiet_transformers():  # it would tell of tied weights, which are in a checkpoint once
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        extra = load_optimizer(Path(checkpoint) / OPTIMIZER_FILE, optimizer)
        self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **extra["scheduler"]})
        told = extra["run"]
        self.tokens, self.seconds, self.stages = told["tokens"], told["seconds"], told["stages"]
        self.eval_loss_start = told["eval_loss_start"]
        self._loss, self._logged = told["loss"], tuple(told["logged"])
        assert self.metrics is not None
        self.metrics.rewind(told["metrics_bytes"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            _load_random_state(Path(checkpoint) / RANDOM_FILE)


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first; names that begin with a dot were being written when the run was killed."""
    found = [p for p in (run / "checkpoints").glob("step-*") if (p / STATE_FILE).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def check_checkpoint(checkpoint: Path) -> None:
    """Raise UserError, naming the file and what to do, if a file of `checkpoint` is missing or torn."""
    try:
        read_json(checkpoint / STATE_FILE)
    except UserError as error:
        raise UserError(f"{error}; delete the checkpoint {checkpoint} and go on from an earlier one") from error
    for file in sorted({checkpoint / OPTIMIZER_FILE, checkpoint / RANDOM_FILE, *checkpoint.glob("*.safetensors")}):
        check_tensors(file)


def _save_random_state(path: Path) -> None:
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"torch": torch.random.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    plain = {"python": [version, list(internal), gauss], "numpy": [name, position, has_gauss, cached]}
    save_tensors(path, tensors, plain)


def _load_random_state(path: Path) -> None:
    tensors, plain = load_tensors_and_metadata(path)
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    name, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
