"""What becomes of a trained model: fused, measured, saved, reopened."""

import gc
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from graftlm.activations import ActivationRecorder
from graftlm.anatomy import read_anatomy
from graftlm.configuring import config_to_dict
from graftlm.environment import peak_memory_bytes
from graftlm.files import atomic_path, read_json, write_text
from graftlm.models import has_own_class, is_own_type, load_model, save_model
from graftlm.modes import evaluating
from graftlm.parts import count_parameters
from graftlm.reporting.card import model_card
from graftlm.sharding import gathered_state, is_sharded
from graftlm.training import distributed
from graftlm.training.config import RunConfig
from graftlm.training.data import PreparedData
from graftlm.training.data.blocks import BlockDataset
from graftlm.training.distributed import is_main
from graftlm.training.run_trainer import RunTrainer

COMPARED = 512
"""Positions of a sequence whose logits are looked at before and after saving: all of a long one's take gigabytes."""
Activations = dict[Any, dict[int, Tensor]]


def mean_activations(trainer: RunTrainer, config: RunConfig) -> tuple[Activations, int]:
    """Mean activations on the sequences that an assessment before training would see, and how many those are."""
    model: nn.Module = trainer.model
    shares = {"heads": config.apex.k_heads, "channels": config.apex.k_channels}
    recorder = ActivationRecorder(model, read_anatomy(model), shares, config.apex.assess_per)  # type: ignore[arg-type]
    with trainer.accelerator.autocast():
        sequences = recorder.run(trainer.assessment_batches(config.apex.assess_samples))
    recorder.close()
    return recorder.mean_activations(), sequences * distributed.world_size()


def finish(
    trainer: RunTrainer,
    config: RunConfig,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    before: Activations | None,
    use_cache: bool,
) -> dict[str, Any]:
    """Fuse, measure, save, reopen. `before`: activations before training; None keeps none of after, either."""
    run, model, apex = trainer.run, trainer.model, trainer.apex
    method = trainer.method
    trainable = apex.budget.trainable if apex else sum(p.numel() for p in model.parameters() if p.requires_grad)
    if method is not None:
        trainable = method.trainable
    if isinstance(data.train, BlockDataset):
        data.train.set_epoch(0)  # what was looked at before training
    sample = next(iter(trainer.assessment_batches(1)))["input_ids"][:, :COMPARED]
    notes = [*trainer.notes, *data.statistics.notes, *(apex.notes if apex else []), *(method.notes if method else [])]
    live = logits_of(model, sample)
    if method is not None:
        method.finish()  # before anything is measured: merged into bfloat16 weights, adapters are rounded
    loss = trainer.end_stage("before_fusion" if apex else "end")
    if apex is not None:
        apex.finish()
        loss = trainer.stages[-1]["eval_loss_after_fusion"] = trainer.evaluate_now("after_fusion")
    selection_loss = trainer.loss_on(data.selection) if data.selection is not None else None
    total = count_parameters(model)
    peak = peak_memory_bytes()
    summary: dict[str, Any] = {
        "method": config.method,
        "model": config.model,
        "tokens": trainer.meter.tokens,
        "steps": trainer.state.global_step,
        "seconds": round(trainer.meter.seconds, 3),
        "tokens_per_second": round(trainer.meter.tokens / trainer.meter.seconds, 1),
        "peak_memory_bytes": peak,
        "trainable_parameters": trainable,
        "trainable_fraction": trainable / total,
        "operator_parameters": apex.operator_parameters if apex else 0,
        "eval_loss_start": trainer.eval_loss_start,
        "eval_loss_end": loss,
        "control": None,
        "stages": trainer.stages,
        "data": told_of_data(data, trainer.meter.tokens),
        "notes": notes,
    }
    if selection_loss is not None:
        summary["selection_loss"] = selection_loss
    if distributed.world_size() > 1:
        summary["processes"] = distributed.world_size()
    model.config.use_cache = use_cache
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    trainer.accelerator.free_memory()
    if apex is not None:
        apex.optimizer = None
    gc.collect()
    weights = gathered_state(model) if is_sharded(model) else None
    if is_main():
        card = run_card(summary, config, own_class=has_own_class(model))
        save_model(model, tokenizer, run / "model", card=card, state_dict=weights)
    del weights
    if before is not None:  # now that the model is safe
        _save_activations(trainer, config, before)
    if not is_main():
        return summary
    try:
        summary["fused_max_abs_logit_difference"] = _reopened_difference(trainer, config, sample, live)
    except torch.OutOfMemoryError:  # the run is done; what follows only looks at it
        notes.append("the saved model was not opened beside the trained one to compare them: too little GPU memory")
    return summary


def told_of_data(data: PreparedData, trained_on: int) -> dict[str, Any]:
    """What the summary says of the data: of training, of what the evaluation loss is measured on, and how many times
    the tokens of an epoch were trained on (None: streamed, so nobody knows how many those are)."""
    keys = ("documents", "tokens", "blocks", "supervised_share", "truncated_share", "evaluation_blocks")
    told = {key: getattr(data.statistics, key) for key in keys}
    measured: Any = data.evaluation
    told["evaluation_tokens"] = sum(len(measured[i]["input_ids"]) for i in range(len(measured))) if measured else 0
    told["epochs"] = trained_on / told["tokens"] if told["tokens"] else None
    return told


def run_card(summary: dict[str, Any], config: RunConfig, *, own_class: bool) -> str:
    """The model card of a run, from as much of its summary as there is. `own_class`: as `model_card`."""
    return model_card(summary, config_to_dict(config), config.model, own_class=own_class)


def renew_card(summary: dict[str, Any], config: RunConfig, folder: Path) -> None:
    """Write the card of the run's model in `folder` once more: it was saved before there was a control to show."""
    own_class = is_own_type(read_json(folder / "config.json").get("model_type"))
    write_text(folder / "README.md", run_card(summary, config, own_class=own_class))


def _reopened_difference(trainer: RunTrainer, config: RunConfig, sample: Tensor, live: Tensor) -> float:
    """Largest of the logits of the saved model from those of the trained one, on the same sample."""
    reopened = load_model(str(trainer.run / "model"), **config.opened_with)
    reopened.to(next(trainer.model.parameters()).device)
    with trainer.accelerator.autocast():  # as the live model computed
        return float((logits_of(reopened, sample) - live).abs().max())


def _save_activations(trainer: RunTrainer, config: RunConfig, before: Activations) -> None:
    after, sequences = mean_activations(trainer, config)
    tables = {"before": before, "after": after}
    flat = {f"{when}/{kind}/{layer}": values.float() for when, kinds in tables.items()
            for kind, layers in kinds.items() for layer, values in layers.items()}  # fmt: skip
    if is_main():
        with atomic_path(trainer.run / "activations.safetensors") as temporary:
            save_file(flat, temporary, metadata={"samples": str(sequences)})


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with evaluating(model):
        logits: Tensor = model(ids.to(next(model.parameters()).device), use_cache=False).logits.float()
    return logits
