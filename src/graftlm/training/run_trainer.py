"""The trainer that `graftlm train` runs on: it measures, stops on NaN, and saves so that a kill loses nothing."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback

from graftlm.activations import count_tokens
from graftlm.apex import Apex
from graftlm.errors import AgreedError, UserError
from graftlm.files import remove_folder
from graftlm.held_out import mean_loss
from graftlm.methods.base import Method
from graftlm.methods.sparse_settings import ReweightingSettings
from graftlm.movement import rate_multipliers, stage_movement
from graftlm.quiet import quiet_transformers
from graftlm.sharding import is_sharded
from graftlm.training.checkpoints import (
    STATE_FILE,
    list_checkpoints,
    load_apex_state,
    load_method_state,
    load_optimizer_state,
    load_random_state,
    load_sharded_model,
    save_method_state,
    save_random_states,
    save_state,
    shared_folder,
)
from graftlm.training.config import DynamicLoadingConfig
from graftlm.training.data.blocks import BlockDataset
from graftlm.training.data.dynamic import DynamicBlocks
from graftlm.training.distributed import every, is_main, world_size
from graftlm.training.dynamic_loading import DynamicLoading
from graftlm.training.meter import Meter
from graftlm.training.metrics import Display, MetricsLog
from graftlm.training.phases import begins_phase, load_phase_start
from graftlm.training.recording import Recording
from graftlm.training.reweighting import Reweighting
from graftlm.training.schedule import refresh, scale_rates
from graftlm.training.trainer import ApexTrainer


class RunTrainer(ApexTrainer):
    """Measures, evaluates and saves a run as it goes, and keeps the story of its stages."""

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
        method: Method | None = None,
        reweighting: ReweightingSettings | None = None,
        phase: Sequence[int] | None = None,
        dynamic_loading: DynamicLoadingConfig | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.phase = (phase[0], phase[1]) if phase is not None else None
        if reweighting is not None and reweighting.strategy != "none":
            self.compute_loss_func = Reweighting(reweighting, lambda: (self.state.global_step, self.state.max_steps))
        self.run = run
        self.notes: list[str] = []
        """What a user should know of the run."""
        self.method = method
        self.evaluation = evaluation
        self.evaluation_batch_size = evaluation_batch_size
        self.display = display
        self.eval_every, self.eval_at, self.save_every = eval_every, eval_at, save_every
        self.loading: DynamicLoading | None = None
        if isinstance(self.train_dataset, DynamicBlocks) and dynamic_loading is not None:
            self.loading = DynamicLoading(dynamic_loading, self.train_dataset, self.loss_on)
        self.metrics: MetricsLog | None = None
        self.meter = Meter()
        self.eval_loss_start: float | None = None
        self.stages: list[dict[str, Any]] = []
        self._unsplit: float | None = None
        """Held-out loss before the last split, of a run whose stages begin with one."""
        self.remove_callback(PrinterCallback)  # Display says it better
        # Before the mixin's own: a step's time is taken before a stage ends, and saving is asked for after.
        self.callback_handler.callbacks.insert(0, Recording(self))

    @property
    def last_step(self) -> int:
        """The optimizer step that this run ends with."""
        return int(self.phase[1] if self.phase is not None else self.state.max_steps)

    # -- measuring ------------------------------------------------------------------------------------------------

    def loss_on(self, data: Any) -> float:
        """mean_loss of `data`, divided between processes (distributed.every)."""
        size = self.evaluation_batch_size
        starts = range(0, len(data), size)
        mine, rounds = every(len(starts))
        taken = [starts[mine[turn] if turn < len(mine) else -1] for turn in range(rounds)]
        batches = (self.data_collator([data[i] for i in range(s, min(s + size, len(data)))]) for s in taken)
        with self.meter.untimed():
            return mean_loss(self.model, batches, counting=len(mine))

    def evaluate_now(self, when: str, loss: float | None = None) -> float | None:
        """Held-out loss now (or as it was found before), written to metrics.jsonl; None without evaluation data."""
        if self.evaluation is None or len(self.evaluation) == 0:
            return None
        if loss is None:
            loss = self.loss_on(self.evaluation)
        self._write(event="eval", when=when, loss=loss, stage=self.apex.clock.stage if self.apex is not None else 0)
        training_log_due = self.control.should_log
        self.log({"eval_loss": loss})
        self.control.should_log = training_log_due  # Trainer takes any log for the one that was due
        return loss

    def update_weights(self) -> None:
        """Give the sources of data the weights that follow from their losses now, if it is time."""
        if self.loading is not None:
            told = self.loading.after_step(self.state.global_step, self._sequences_a_step())
            if told is not None:
                self._write(event="weights", **told, stage=self.apex.clock.stage if self.apex is not None else 0)

    def _write(self, *, stage: int, **values: Any) -> None:
        assert self.metrics is not None
        step, meter = self.state.global_step, self.meter
        self.metrics.write(**values, step=step, tokens=meter.tokens, seconds=round(meter.seconds, 3), stage=stage)

    def log_training(self, logs: Mapping[str, float]) -> None:
        step, total = self.state.global_step, self.state.max_steps
        found = self.meter.since_logged(step)
        # The stage that the step was taken in: another may have begun since.
        stage = bisect_left(self.apex.clock.starts, step) - 1 if self.apex is not None else 0
        self._write(
            event="train",
            loss=found.loss,
            learning_rate=logs.get("learning_rate"),
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=round(found.tokens_per_second, 1),
            stage=stage,
        )
        left = self.meter.seconds / max(1, step) * (total - step)
        self.display.figures(step, total, found.loss, found.tokens_per_second, left)

    # -- the story of a run ---------------------------------------------------------------------------------------

    def assess(self, apex: Apex) -> None:
        self.display.say(f"assessing {apex.config.assess_samples} sequences before training")
        with self.meter.timed():
            super().assess(apex)

    def begin_run(self) -> None:
        assert self.metrics is not None
        self.metrics.rewind(0)
        self.eval_loss_start = self.evaluate_now("start", self._unsplit)
        if self.loading is not None:
            self.loading.begin()
        if self.apex is not None:
            self._begin_stage(self.eval_loss_start)

    def before_split(self) -> None:
        """Evaluate: what a split changes is not what training or fusion did."""
        if self.evaluation is not None and len(self.evaluation):
            self._unsplit = self.loss_on(self.evaluation)

    def _begin_stage(self, loss: float | None) -> None:
        """loss: held-out, before a split."""
        split = self.apex is not None and self.apex.splitter is not None
        self._tell_stage(self.evaluate_now("stage_start") if split else loss)

    def _tell_stage(self, loss: float | None) -> None:
        assert self.apex is not None
        story: dict[str, Any] = {
            "stage": self.apex.clock.stage,
            "step": self.apex.clock.step,
            "tokens": self.meter.tokens,
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
        with self.meter.timed():
            super().next_stage()
        loss = self.evaluate_now("after_fusion", self._unsplit)
        self.stages[-1]["eval_loss_after_fusion"] = loss
        self._begin_stage(loss)
        stage, after = self.apex.clock.stage + 1, self.state.global_step
        self.display.say(f"stage {stage} of {self.apex.config.stages} begins after step {after}")
        self.control.should_save = True

    def end_stage(self, when: str) -> float | None:
        """Evaluate before fusion and close the stage's story."""
        loss = self.evaluate_now(when)
        if self.stages:
            self.stages[-1]["eval_loss_before_fusion"] = loss
            self.stages[-1]["steps"] = self.state.global_step - self.stages[-1]["step"]
            if self.apex is not None:
                self.stages[-1] |= {"moved": stage_movement(self.apex), "multiplier": rate_multipliers(self.apex)}
        return loss

    def end_apex(self) -> None:
        """Left to finishing.py, which evaluates before and after the last fusion."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        method = self.method
        if self._resume_from is not None and begins_phase(Path(self._resume_from)):
            self._resume_from = None  # only data and learning rate go on: APEX begins anew, on a smaller model
        if method is None:
            return super().create_optimizer(model)
        method.check_steps(self.state.max_steps)
        if self._resume_from is None:
            with self.meter.timed():
                method.look(self._batches)
        optimizer = super().create_optimizer(model)
        method.start(optimizer, self.state.max_steps)
        return optimizer

    def _batches(self, samples: int) -> Iterator[dict[str, Tensor]]:
        device = next(self.model.parameters()).device
        for batch in self.assessment_batches(samples, labels=True):
            yield {key: value.to(device) for key, value in batch.items()}

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        fresh = self.lr_scheduler is None
        told = self.args.lr_scheduler_kwargs
        decay = told.get("num_decay_steps") if isinstance(told, dict) else None
        warmup = self.args.get_warmup_steps(num_training_steps)
        if decay is not None and warmup + decay > num_training_steps + 1:  # both are rounded, of very short runs up
            raise UserError(
                f"lr_scheduler_kwargs.num_decay_steps: {decay} and {warmup} steps of warmup are more than the run's "
                f"{num_training_steps}, so learning_rate would never be reached; give fewer"
            )
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if fresh and self.method is not None and type(self.method).rate_factor is not Method.rate_factor:
            scale_rates(scheduler, self.optimizer, self.method.rate_factor)
        return scheduler

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.compute_loss_func, Reweighting):
            self.compute_loss_func.watch(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        tokens = count_tokens(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.method is not None and self.accelerator.sync_gradients:
            self.method.after_backward()
        self.meter.add(tokens, loss)
        return loss

    def check_step(self, total: Tensor) -> None:
        """Before an optimizer step: stop, on all processes at once, if it would be one on NaN or Inf."""
        if (what := self.meter.end_step(total)) is not None:
            self.refuse(what)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.train_dataset, BlockDataset):
            self.train_dataset.set_epoch(kwargs["epoch"])
        if self.state.global_step < self.last_step:
            super()._run_epoch(*args, **kwargs)
        else:  # resumed from the last step's checkpoint: Trainer would take one step more before it sees that
            self.control.should_training_stop = True

    def refuse(self, what: str) -> None:
        kind = UserError if is_main() else AgreedError
        raise kind(
            f"{what} is NaN or Inf at step {self.state.global_step + 1} of {self.run}; the step was not taken: look at "
            "the data (graftlm data), or start again with a lower learning_rate and another output_dir (--resume comes "
            "to the same step, unless the hardware was at fault)"
        )

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Everything of this moment, in one folder that is there whole or not at all."""
        if not self.args.save_total_limit:
            return
        folder = self.run / "checkpoints" / f"step-{self.state.global_step}"
        assert self.metrics is not None
        scheduler = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
        told = {
            **self.meter.state_dict(),
            "stages": self.stages,
            "eval_loss_start": self.eval_loss_start,
            "metrics_bytes": self.metrics.size,
            "parameters": self._optimized(),
            "sequences_a_step": self._sequences_a_step(),
            "loading": self.loading.state_dict() if self.loading is not None else None,
        }
        apex = self.apex.state_dict() if self.apex is not None else None  # which all processes take part in
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        with shared_folder(folder) as temporary:
            save_state(temporary, self.model, optimizer, apex, {"scheduler": scheduler, "run": told})
            save_random_states(temporary)
            if is_main() and self.method is not None:
                save_method_state(temporary, self.method.state_dict())
            if is_main():
                self.state.save_to_json(str(temporary / STATE_FILE))
        if is_main():
            for old in list_checkpoints(self.run)[: -self.args.save_total_limit]:
                remove_folder(old)

    def _optimized(self) -> list[str]:
        """Names of the optimizer's parameters, in its order."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [names.get(id(p), "") for group in self.optimizer.param_groups for p in group["params"]]

    def _sequences_a_step(self) -> int:
        args = self.args
        return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size())

    def save_apex(self, checkpoint: str) -> None:
        """Done: it is part of _save_checkpoint, so that a checkpoint is whole or not there."""

    def load_apex(self, checkpoint: str) -> dict[str, Tensor]:
        return load_apex_state(Path(checkpoint), self.model)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if is_sharded(self.model):
            load_sharded_model(Path(args[0]), self.model)
            return
        if self.method is not None:
            self.method.load_state_dict(load_method_state(Path(args[0])))
        with quiet_transformers():  # it would tell of tied weights, which are in a checkpoint once
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        begins = begins_phase(Path(checkpoint))
        load = load_phase_start if begins else load_optimizer_state
        extra = load(Path(checkpoint), self.model, optimizer)
        self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **extra["scheduler"]})
        told = extra["run"]
        self.meter.load_state_dict(told)
        self.stages, self.eval_loss_start = told["stages"], told["eval_loss_start"]
        if self.loading is not None:
            self.loading.load_state_dict(told["loading"])
        assert self.metrics is not None
        self.metrics.rewind(told["metrics_bytes"])
        if begins:
            refresh(self.lr_scheduler, optimizer)
            if self.apex is not None:
                self._tell_stage(self.eval_loss_start)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_state(Path(checkpoint))
