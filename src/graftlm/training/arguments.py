"""RunConfig -> transformers' TrainingArguments."""

import importlib.util
import os
from pathlib import Path

import torch
from transformers import TrainingArguments

from graftlm.errors import UserError
from graftlm.training.config import RunConfig

# Passed on under the same name.
SAME = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "bf16",
    "torch_compile",
    "logging_steps",
    "save_total_limit",
    "seed",
)


def training_arguments(config: RunConfig) -> TrainingArguments:
    """TrainingArguments of a run. Evaluation, checkpoints and progress are RunTrainer's, so transformers' are off.

    Raises UserError for a tracker that is not installed and for values that transformers refuses.
    """
    for tracker in config.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"report_to: {tracker} is not installed; pip install {tracker}, or leave it out")
    run = Path(config.output_dir)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run / "tensorboard"))
    try:
        return TrainingArguments(
            output_dir=str(run),
            **{name: getattr(config, name) for name in SAME},
            warmup_steps=config.warmup_ratio,  # below 1: a share of the steps
            activation_checkpointing=config.gradient_checkpointing,
            report_to=list(config.report_to) or "none",
            run_name=run.name,
            data_seed=config.seed,
            eval_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # it would hide a NaN behind the mean of earlier losses
            remove_unused_columns=False,
            use_cpu=not torch.accelerator.is_available(),  # else transformers refuses bf16 there
            dataloader_pin_memory=torch.cuda.is_available(),
        )
    except ValueError as error:
        raise UserError(f"transformers refuses these settings: {' '.join(str(error).split())}") from error
