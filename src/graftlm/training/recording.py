"""What RunTrainer does at Trainer's events."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftlm.sharding import total_norm

if TYPE_CHECKING:
    from graftlm.training.run_trainer import RunTrainer


class Recording(TrainerCallback):
    """Writes metrics, asks for evaluations and checkpoints, and stops before a step on NaN or Inf."""

    def __init__(self, trainer: "RunTrainer"):
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self._trainer
        if state.global_step == 0:
            trainer.begin_run()
        trainer.display.start(state.global_step, state.max_steps)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.meter.start()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # After clipping: a norm of NaN makes every gradient NaN, and one of Inf makes NaN of what was Inf.
        gradients = [p.grad for p in self._trainer.model.parameters() if p.grad is not None]
        self._trainer.check_step(total_norm(gradients))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self._trainer
        if trainer.method is not None:
            trainer.method.after_step(state.global_step)
        step = state.global_step
        due = step in trainer.eval_at or (trainer.eval_every and step % trainer.eval_every == 0)
        last = step == trainer.last_step
        saving = last or (trainer.save_every and step % trainer.save_every == 0)
        # A wait after every step would leave a GPU idle until it has been told of the next one.
        trainer.meter.stop(wait=bool(due or saving))
        trainer.display.step(step)
        if step < state.max_steps:  # at the end of a phase too, for the next
            trainer.update_weights()
        if due and not last:
            trainer.evaluate_now("periodic")
        # The last step too: whatever then goes wrong with saving the model (a full disk), the training is not lost.
        if saving:
            control.should_save = True
        if last:  # which may be before max_steps, in a phase of a longer run
            control.should_training_stop = True
        else:
            trainer.meter.start()  # the next step's time begins with waiting for its data

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self._trainer.log_training(logs)
