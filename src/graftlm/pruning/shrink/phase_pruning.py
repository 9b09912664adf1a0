"""The first half of a phase: a smaller model, and what its training goes on from, in one folder that is there whole or
not at all."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from graftlm.errors import UserError
from graftlm.files import atomic_folder, read_json, write_json
from graftlm.fused_loss import fused_where_it_fits
from graftlm.held_out import mean_loss
from graftlm.models import load_model, load_skeleton, load_tokenizer
from graftlm.modes import mixed
from graftlm.parts import count_parameters
from graftlm.pruning.base import Pruned, PruneStep
from graftlm.pruning.calibration import calibration_from
from graftlm.pruning.notes import notes_on
from graftlm.pruning.prune import prune
from graftlm.pruning.saving import save_pruned
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.shapes import shapes_of
from graftlm.pruning.shrink.config import Shrink
from graftlm.pruning.shrink.folders import PhaseFolder
from graftlm.pruning.shrink.phases import Phase
from graftlm.pruning.surgery import kept_slices
from graftlm.pruning.targets import find_target
from graftlm.pruning.ways import WAYS, is_uniform, sequences_seen
from graftlm.training.checkpoints import list_checkpoints
from graftlm.training.data import prepare_data
from graftlm.training.data.dynamic import DynamicBlocks
from graftlm.training.layout import run_device
from graftlm.training.phases import write_phase_start
from graftlm.training.run_folder import check_same_data


def prune_settings(shrink: Shrink, phase: Phase, phases: int) -> PruneSettings:
    """How a phase of so many prunes; each sees calibration sequences of its own."""
    settings = shrink.prune
    iterations, whole = settings.iterations, WAYS[settings.method].iterations
    if iterations is None and whole is not None:  # from the original to the target, which phases share out
        iterations = max(1, whole * phase.number // phases - whole * (phase.number - 1) // phases)
    return dataclasses.replace(
        settings,
        iterations=iterations,
        sparsity=None,
        target_parameters=phase.parameters,
        seed=settings.seed if phase.number == 1 else _mixed(settings.seed, phase.number),
    )


def _mixed(seed: int, number: int) -> int:
    """A seed of its own for every pair: those of a trial's phases are not other trials', as sums would be."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def prune_phase(
    shrink: Shrink, folder: PhaseFolder, before: PhaseFolder | None, last: Phase, heard: Callable[[PruneStep], None]
) -> None:
    """Make `folder.pruned` from what the phase before has trained, or from the original model.

    last: the shrink's last phase.
    heard: is told of every PruneStep.
    """
    began = time.monotonic()
    run = shrink.run
    name = str(before.trained) if before else run.model
    # Importance is measured in the weights' own dtype, and in 32 bits flash attention has no kernel.
    attention = "sdpa" if run.flash_over_float32 else run.attn_implementation
    how: dict[str, Any] = {"attn_implementation": attention, "trust_remote_code": run.trust_remote_code}
    model = load_model(name, dtype=run.dtype, **how)
    tokenizer = load_tokenizer(name, chat_template=run.chat_template, trust_remote_code=run.trust_remote_code)
    model.to(run_device(model))  # type: ignore[arg-type]
    losses = _Losses(shrink, tokenizer)
    if before:  # now, before other sequences decide what goes
        check_same_data(before.train, losses.data, goes_on=True)
    check_same_data(folder.train, losses.data, goes_on=False)  # tells the phase's training what it must see
    told = read_json(before.summary) if before else None
    loss_before = told["eval_loss_end"] if told else losses.of(model)
    references = losses.by_source(model) if before is None else None
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    original = count_parameters(model)
    settings = prune_settings(shrink, folder.phase, last.number)
    least = read_json(before.facts).get("least_parameters") if before else _left_at_last(model, settings, last)
    settings = dataclasses.replace(settings, least_parameters=tuple(least or ()))
    pruned: Pruned | None = None
    set_seed(run.seed + folder.phase.number)
    if original > folder.phase.parameters:
        calibration = calibration_from(
            tokenizer,
            settings,
            shrink.settings.data,
            cache_dir=run.cache_dir,
            streaming=run.streaming,
            task=run.task,
            held_back=None if run.eval_data else run,
        )
        pruned = prune(model, settings, calibration, heard)
        pruned = dataclasses.replace(pruned, notes=notes_on(pruned, calibration.notes))
        model = pruned.model
    slices = _slices(name, how, pruned, model, shapes) if before and shrink.settings.keep_moments else {}
    loss_after = losses.of(model) if pruned else loss_before
    facts = {
        "phase": folder.phase.number,
        "target_parameters": folder.phase.parameters,
        "least_parameters": least,
        "parameters_before": original,
        "parameters": count_parameters(model),
        "eval_loss_before_pruning": loss_before,
        "eval_loss_after_pruning": loss_after,
        "reference_losses": references,
        "shapes": [shape.overrides() for shape in shapes_of(model)],
        "layer_importance": [step.layer_importance for step in pruned.steps] if pruned else [],
        "calibration_tokens": sequences_seen(settings) * settings.sample_length if pruned else 0,
        "notes": list(pruned.notes) if pruned else [],
    }
    with atomic_folder(folder.pruned) as temporary:
        save_pruned(pruned or model, tokenizer, temporary)
        if before:
            folder.start_in(temporary).mkdir()
            write_phase_start(
                folder.start_in(temporary),
                list_checkpoints(before.train)[-1],
                eval_loss=loss_after,
                shapes=shapes if shrink.settings.keep_moments else None,
                slices=slices,
            )
        write_json(folder.facts_in(temporary), {**facts, "seconds": round(time.monotonic() - began, 3)})


def _left_at_last(model: PreTrainedModel, settings: PruneSettings, last: Phase) -> tuple[int, ...]:
    """Parameters of heads and of channels that the last phase is to leave of the original `model`: as if it was pruned
    at once. () where a method takes no components, or of one kind alone."""
    if not WAYS[settings.method].components or last.parameters >= count_parameters(model):
        return ()
    at_once = dataclasses.replace(settings, target_parameters=last.parameters)
    by_kind = find_target(model, at_once, uniform=is_uniform(settings)).by_kind
    return by_kind if len(by_kind) == 2 else ()


def _slices(
    name: str,
    how: Mapping[str, Any],
    pruned: Pruned | None,
    model: PreTrainedModel,
    shapes: Mapping[str, torch.Size],
) -> dict[str, tuple[int, Tensor]]:
    """What of each parameter of the model `name` is in `model`. UserError where a method has made something else."""
    if pruned is None:
        return {}
    unpruned = load_skeleton(name, **how)
    assert unpruned is not None  # a folder of ours
    slices = kept_slices(unpruned, pruned.kept)
    for path, parameter in model.named_parameters():
        wanted = list(shapes[path]) if path in shapes else None
        if wanted is not None and path in slices:
            wanted[slices[path][0]] = len(slices[path][1])
        if wanted != list(parameter.shape):
            raise UserError(
                f"keep_moments: {pruned.settings.method} changes more of {path} than taking components out, so its "
                "moments cannot survive; set keep_moments: false"
            )
    return slices


class _Losses:
    """Held-out loss of the models of a phase, on what its training is evaluated on."""

    def __init__(self, shrink: Shrink, tokenizer: PreTrainedTokenizerBase):
        self._run = shrink.run
        self.data = prepare_data(shrink.run, tokenizer)

    def of(self, model: PreTrainedModel) -> float | None:
        """None without held-out data."""
        data = self.data.evaluation
        return None if data is None or not len(data) else self._on(data, model)  # type: ignore[arg-type]

    def by_source(self, model: PreTrainedModel) -> list[float] | None:
        """What dynamic loading compares with, as far as it is not given; None without it."""
        data = self.data.train
        return [self._on(one, model) for one in data.held_out] if isinstance(data, DynamicBlocks) else None

    def _on(self, data: Any, model: PreTrainedModel) -> float:
        size, count = self._run.per_device_eval_batch_size, len(data)
        batches = (self.data.collator([data[i] for i in range(s, min(s + size, count))]) for s in range(0, count, size))
        # As training is evaluated where it can be: without a table of all logits.
        with fused_where_it_fits(model, wanted=self._run.fused_loss is not False), mixed(model, self._run.bf16):
            return mean_loss(model, batches)
