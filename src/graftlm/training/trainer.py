"""APEX in Hugging Face's Trainer and TRL's SFTTrainer: a mixin over public methods.

A callback alone cannot do it: gradients must be pulled back after the last backward pass and before clipping, and
Trainer has no event there.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from graftlm.activations import MODEL_INPUTS
from graftlm.anatomy import Kind
from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.checkpointing import APEX_FILE, load_tensors, save_tensors
from graftlm.errors import UserError
from graftlm.training.data.streaming import StreamedBlocks
from graftlm.training.schedule import base_schedule, follows_stages, refresh, stage_factor


class _Stages(TrainerCallback):
    """Counts steps and moves to the next stage; saves Apex beside each of Trainer's checkpoints."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        apex: Apex | None = self._trainer.apex
        if apex is not None:
            apex.clock.step += 1
            if apex.due(epoch=state.epoch):
                self._trainer.next_stage()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._trainer.apex is not None:
            self._trainer.save_apex(f"{args.output_dir}/checkpoint-{state.global_step}")


class ApexMixin:
    """Put it before a Trainer: `class MyTrainer(ApexMixin, Trainer)`, and pass apex=ApexConfig(...).

    With apex=None nothing changes. After train() the model is an ordinary one, fused.
    """

    apex: Apex | None = None
    activations: dict[Kind, dict[int, Tensor]] | None = None
    """Mean activations seen in the assessment before training."""
    schedule_config: ApexConfig | None = None
    stage_starts: list[int] | None = None
    """A plain run that follows the learning rate of an APEX run: its settings, and the steps at which stages began."""
    phase: tuple[int, int] | None = None
    """First step and end of a part of a longer run, over which stages are laid out; None: the whole run."""

    def __init__(self, *args: Any, apex: ApexConfig | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.apex_config = apex
        self._resume_from: str | None = None
        self.add_callback(_Stages(self))  # type: ignore[attr-defined]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        if self.apex_config is not None and self.optimizer is not None:  # type: ignore[attr-defined]
            raise UserError(
                "apex: the optimizer must be made after the operators; leave it to Trainer (optim, "
                "optimizer_cls_and_kwargs), and to train a second time make a new trainer"
            )
        if resume_from_checkpoint is True:
            self._resume_from = get_last_checkpoint(self.args.output_dir)  # type: ignore[attr-defined]
        else:
            self._resume_from = resume_from_checkpoint or None
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]
        finally:
            self.end_apex()
        return output

    def end_apex(self) -> None:
        """Fuse the last stage and take everything of APEX off the model."""
        if self.apex is not None:
            self.apex.finish()

    def save_apex(self, checkpoint: str) -> None:
        """Put Apex beside what Trainer has saved in the folder `checkpoint`. All processes call it."""
        assert self.apex is not None
        state = self.apex.state_dict()  # which all processes take part in
        if self.args.should_save:  # type: ignore[attr-defined]
            save_tensors(f"{checkpoint}/{APEX_FILE}", state)

    def load_apex(self, checkpoint: str) -> dict[str, Tensor]:
        """What save_apex has put in the folder `checkpoint`."""
        return load_tensors(f"{checkpoint}/{APEX_FILE}")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        trainer: Any = self
        if self.apex_config is not None:
            total = trainer.state.max_steps
            self.apex = Apex(
                trainer.model,
                self.apex_config,
                total_steps=total,
                total_epochs=trainer.args.num_train_epochs if trainer.args.max_steps <= 0 else None,
            )
            self.apex.before_split = self.before_split
            if self.phase is not None:
                self.apex.clock.begin_at(self.phase[0], self.phase[1] - self.phase[0])
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if self.apex is not None:
            if self._resume_from is not None:
                self.apex.load_state_dict(self.load_apex(self._resume_from))
            else:
                self.assess(self.apex)
            with trainer.accelerator.autocast():  # accelerate has not wrapped the model yet, and a split is measured
                self.apex.start(optimizer)
        return optimizer

    def assess(self, apex: Apex) -> None:
        """The assessment before training (footnote 3): forward passes on assess_samples training sequences."""
        by = apex.config.assessment
        if by in ("random", "magnitude"):
            return
        trainer: Any = self
        with trainer.accelerator.autocast():  # accelerate has not wrapped the model yet
            apex.assess(self.assessment_batches(apex.config.assess_samples, labels=by == "gradient"))
        if by == "gradient":  # no activation was recorded
            return
        self.activations = apex.recorder.mean_activations()

    def assessment_batches(self, samples: int, *, labels: bool = False) -> Iterator[dict[str, Tensor]]:
        """Batches of `samples` training sequences, spread evenly over the data (streams: the first ones); draws no
        random number, so a plain run beside this one sees the same order. `labels`: these too, for a loss."""
        trainer: Any = self
        data, args = trainer.train_dataset, trainer.args
        if _has_length(data):
            samples = min(samples, len(data))
        share = -(-samples // args.world_size)  # as many on every process: with fsdp2 they run the model together
        samples = share * args.world_size
        size = args.per_device_train_batch_size
        mine: Any = range(args.process_index, samples, args.world_size)
        rows: Iterator[Any]
        if _has_length(data):
            rows = (data[i * len(data) // samples] for i in mine)
        else:
            once = data.one_pass() if isinstance(data, StreamedBlocks) else iter(data)
            rows = islice(once, args.process_index, None, args.world_size)
        taken = islice(rows, share)
        while batch := list(islice(taken, size)):
            collated = trainer.data_collator(batch)
            yield {k: v for k, v in collated.items() if k in MODEL_INPUTS or (labels and k == "labels")}

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        trainer: Any = self
        config, starts = self.apex_config or self.schedule_config, self.stage_starts
        if config is None or not follows_stages(config) or trainer.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        optimizer = optimizer or trainer.optimizer
        args = trainer.args
        warmup = args.get_warmup_steps(num_training_steps)
        base = base_schedule(
            args.lr_scheduler_type, args.learning_rate, warmup, num_training_steps, args.lr_scheduler_kwargs
        )

        def factor(step: int) -> float:
            return stage_factor(
                step,
                self.apex.clock.starts if self.apex is not None else starts or [0],
                config,
                base=base.lr_lambdas[0],
                learning_rate=args.learning_rate,
                warmup_steps=warmup,
                total_steps=num_training_steps,
            )

        trainer.lr_scheduler = LambdaLR(optimizer, factor)
        trainer._created_lr_scheduler = True
        return trainer.lr_scheduler

    def next_stage(self) -> None:
        """Fuse, choose anew, begin the next stage."""
        assert self.apex is not None
        trainer: Any = self
        self.apex.next_stage()
        if follows_stages(self.apex.config):
            refresh(trainer.lr_scheduler, trainer.optimizer)

    def before_split(self) -> None:
        """Called before a stage's split changes the model (apex.start: split)."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if self.apex is not None and self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            self.apex.pull_back()
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        penalty = self.apex.penalty() if self.apex is not None and model.training else None
        if penalty is None:
            return result
        # Trainer's loss is already a share of the step's; so must this be.
        penalty = penalty / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        return (result[0] + penalty, result[1]) if return_outputs else result + penalty


def _has_length(data: Any) -> bool:
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


class ApexTrainer(ApexMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer with APEX."""


def __getattr__(name: str) -> Any:
    """ApexSFTTrainer is made on first use: importing TRL takes seconds that nobody else should wait for."""
    if name == "ApexSFTTrainer":
        from trl import SFTTrainer

        found = type(name, (ApexMixin, SFTTrainer), {"__doc__": "TRL's SFTTrainer with APEX.", "__module__": __name__})
        globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
