"""RunConfig -> transformers' TrainingArguments."""

import difflib
import importlib.util
import os
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_flash_attn_2_available

from graftlm.distilled_loss import DistilledLoss
from graftlm.errors import UserError
from graftlm.fused_loss import FusedLoss, unfit
from graftlm.training.config import RunConfig
from graftlm.training.schedule import base_schedule

TENSORBOARD = "TENSORBOARD_LOGGING_DIR"
"""How transformers is told where TensorBoard's files go."""
GIVEN = frozenset(os.environ)
"""Variables that were set when the program began: by the user, or a launcher."""
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow", "comet_ml", "clearml", "swanlab", "dvclive", "neptune")
FLASH = "flash_attention_2"
TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")
LIBRARIES = {
    "grokadamw": "grokadamw",
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
    "stable_adamw": "optimi",
    "adamw_anyprecision": "torchdistx",
}
"""What names of optimizers begin with -> the package that has them."""

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
    "logging_steps",
    "save_total_limit",
    "seed",
)


def check_settings(config: RunConfig) -> None:
    """Raise UserError, before anything is made or read, for an optimizer, a schedule, or numbers that this machine or
    this trainer cannot do."""
    _check_schedule(config)
    _check_optimizer(config)
    for tracker in config.report_to:
        if tracker not in TRACKERS:  # and no advice to install whatever has that name
            raise UserError(f"report_to: {tracker!r} must be one of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"report_to: {tracker} is not installed; pip install {tracker}, or leave it out")
    if config.attn_implementation == FLASH and not is_flash_attn_2_available():
        raise UserError(
            f"attn_implementation: {FLASH} needs a GPU and the package flash-attn; pip install flash-attn, or use sdpa"
        )
    if config.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"bf16: {torch.cuda.get_device_name()} computes no bfloat16 and would emulate it slowly; set bf16: false"
        )


def _check_optimizer(config: RunConfig) -> None:
    """Raise UserError for an `optim` that is unknown, whose library is missing, or that cannot be resumed."""
    names = [name.value for name in OptimizerNames]
    if config.optim not in names:
        longer = [name for name in names if name.startswith(config.optim)]  # adamw: adamw_torch, not grokadamw
        near = longer or difflib.get_close_matches(config.optim, names, n=1)
        raise UserError(f"optim: {config.optim} is no optimizer of transformers; try {near[0] if near else names[0]}")
    if config.optim in TORCHAO:
        raise UserError(f"optim: the state of {config.optim} cannot be kept in a checkpoint; use adamw_8bit")
    if config.optim.startswith(("galore", "apollo")):
        raise UserError(f"optim: {config.optim} asks for optim_target_modules, which no key sets; use adamw_torch")
    if config.optim.startswith("schedule_free"):
        raise UserError(
            f"optim: {config.optim} is measured and saved at other weights than it trains, which this trainer does not "
            "do; use adamw_torch"
        )
    library = next((library for start, library in LIBRARIES.items() if config.optim.startswith(start)), None)
    if library is not None and importlib.util.find_spec(library) is None:
        raise UserError(
            f"optim: {config.optim} needs {library}, which is not installed; use adamw_torch, or install it"
        )
    eight_bit = "8bit" in config.optim or config.optim.startswith(("paged_", "ademamix", "lion", "rmsprop_bnb"))
    if eight_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"optim: {config.optim} needs bitsandbytes; pip install bitsandbytes, or use adamw_torch")
    if config.method == "apex" and config.apex.start == "split" and not config.state_moves:
        raise UserError(
            f"optim: apex.start: split takes optimizer state along with the weights, which that of {config.optim} does "
            "not allow; use adamw_torch, or apex.start: zero"
        )
    if "8bit" in config.optim and config.distributed.strategy == "fsdp2":
        raise UserError(f"optim: {config.optim} does not know fsdp2's shards; use adamw_torch, or strategy ddp")


def _check_schedule(config: RunConfig) -> None:
    told = config.lr_scheduler_kwargs
    if config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise UserError(
            f"lr_scheduler_type: {config.lr_scheduler_type} follows evaluations of transformers' own, which are off "
            "here; choose another, e.g. cosine"
        )
    names = [name.value for name in SchedulerType]
    if config.lr_scheduler_type not in names:
        near = difflib.get_close_matches(config.lr_scheduler_type, names, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"lr_scheduler_type: {config.lr_scheduler_type} is no schedule of transformers; {meant}")
    try:
        base_schedule(config.lr_scheduler_type, config.learning_rate, 1, 100, told)
    except (TypeError, ValueError) as error:
        given = f"lr_scheduler_kwargs {told}" if told else "no lr_scheduler_kwargs"
        raise UserError(
            f"lr_scheduler_type: {config.lr_scheduler_type} with {given}: {' '.join(str(error).split())}; give "
            "lr_scheduler_kwargs that it takes, or another schedule"
        ) from error


def training_arguments(config: RunConfig) -> TrainingArguments:
    """TrainingArguments of a run. Evaluation, checkpoints and progress are RunTrainer's, so transformers' are off.

    Raises UserError for a tracker that is not installed and for values that transformers refuses.
    """
    if config.use_liger_kernel and (importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available()):
        raise UserError(
            "use_liger_kernel: needs a GPU and the package liger-kernel; pip install liger-kernel, or set it to false"
        )
    run = Path(config.output_dir)
    if TENSORBOARD not in GIVEN:
        os.environ[TENSORBOARD] = str(run / "tensorboard")  # of this run, whatever ran before it
    try:
        arguments = TrainingArguments(
            output_dir=str(run),
            **{name: getattr(config, name) for name in SAME},
            warmup_steps=config.warmup_ratio,  # below 1: a share of the steps
            activation_checkpointing=config.gradient_checkpointing,
            report_to=list(config.report_to) or "none",
            run_name=run.name,
            data_seed=config.seed,
            train_sampling_strategy="sequential" if config.dynamic_loading.every else "random",
            eval_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # it would hide a NaN behind the mean of earlier losses
            remove_unused_columns=False,
            # fsdp2: layers are compiled one by one (sharding.py)
            torch_compile=config.torch_compile and config.distributed.strategy != "fsdp2",
            ddp_find_unused_parameters=False,  # operators, which get no gradient in a backward pass, are out of DDP
            use_liger_kernel=config.use_liger_kernel,
            # Not its SwiGLU: the gate that assesses channels (fused_gate.py) does the same and takes their statistic.
            liger_kernel_config={
                "rope": True,
                "rms_norm": True,
                "swiglu": False,
                "cross_entropy": False,
                "fused_linear_cross_entropy": config.fused_loss is not False,
            },
            use_cpu=not torch.cuda.is_available(),  # Apple's MPS has no float64, which statistics are summed in
            dataloader_pin_memory=torch.cuda.is_available(),
            # Streams: every process reads for itself. What accelerate would do, join the first one's batches and deal
            # them out, takes batches of one length only.
            accelerator_config={"dispatch_batches": False},
        )
    except ValueError as error:
        raise UserError(f"transformers refuses these settings: {' '.join(str(error).split())}") from error
    if arguments.n_gpu > 1:  # one process without a launcher: Trainer would spread each batch over all GPUs it sees
        arguments._n_gpu = 1
    return arguments


def fuse_loss(config: RunConfig, model: PreTrainedModel, teacher: PreTrainedModel | None = None) -> FusedLoss | None:
    """The fused loss on `model`, where the run has ours; with a teacher, distilled_loss.py's. Raises UserError where it
    is asked for and cannot be."""
    if teacher is not None:
        told = config.distillation
        return DistilledLoss(model, teacher, weight=told.weight, temperature=told.temperature)
    if config.fused_loss is False or config.use_liger_kernel:
        return None
    reweighs = config.reweighting.strategy != "none"
    if config.fused_loss is True and reweighs:
        raise UserError("fused_loss: reweighting needs the losses of all samples at once; set it to false or auto")
    if config.fused_loss == "auto" and (config.torch_compile or reweighs or unfit(model)):
        return None
    return FusedLoss(model)
