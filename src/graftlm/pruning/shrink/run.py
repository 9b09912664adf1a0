"""`graftlm shrink`: phases of pruning and training, each in a folder of its own, until the model has its size.

Killed at any moment, the same call goes on: what is finished lies in folders that are there whole or not at all, and
training goes on from its last checkpoint.
"""

import dataclasses
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from rich.console import Console

from graftlm.configuring import dump_values
from graftlm.environment import describe_environment
from graftlm.errors import UserError
from graftlm.files import locked, plain_disk_errors, read_json, remove_unfinished, write_json, write_text
from graftlm.models import load_model, load_tokenizer
from graftlm.parts import count_parameters, layer_parameters
from graftlm.pruning.base import PruneStep
from graftlm.pruning.checks import check
from graftlm.pruning.saving import save_pruned
from graftlm.pruning.shapes import shapes_of
from graftlm.pruning.shrink.card import shrunk_card
from graftlm.pruning.shrink.config import Shrink, load_shrink
from graftlm.pruning.shrink.folders import PhaseFolder
from graftlm.pruning.shrink.phase_pruning import prune_phase, prune_settings
from graftlm.pruning.shrink.phases import Phase, phases_of
from graftlm.pruning.shrink.story import print_summary, summarise, write_metrics
from graftlm.pruning.targets import asked_parameters
from graftlm.reporting import figures
from graftlm.training.arguments import check_settings
from graftlm.training.checkpoints import list_checkpoints
from graftlm.training.config import RunConfig
from graftlm.training.plan import model_for_shapes
from graftlm.training.run import train_one
from graftlm.training.run_folder import is_elsewhere

FIRST = "phase_01/pruned/phase.json"
"""What is there once something depends on the settings."""
ONCE = ("slicegpt",)
"""Methods that cannot prune what they have pruned."""
FREE = {
    *("keep", "train.save_total_limit", "train.report_to", "train.logging_steps"),
    *("train.per_device_eval_batch_size", "train.save_steps", "train.cache_dir"),
}
"""What may differ when a shrink goes on, without changing a weight."""


def run_shrink(task: Shrink, *, console: Console | None = None) -> dict[str, Any]:
    """Shrink as `task` says, or go on with it; returns summary.json. A finished one is left as it is.

    Raises UserError for anything a person can mend; what was finished before stays.
    """
    given, console = console, console or Console(stderr=True)
    check_settings(task.run)
    folder = task.folder
    finished = folder / "summary.json"
    if (folder / FIRST).exists():  # until then nothing depends on the settings, and a mistake in them can be mended
        _check_same_config(task)
    if finished.exists():
        summary: dict[str, Any] = read_json(finished)
        told = f"{folder} is finished; nothing to do (delete it, or give another output_dir)"
        console.print(told, highlight=False, soft_wrap=True)
        return summary
    plan = None if (folder / FIRST).exists() else plan_phases(task)  # before anything is written
    _make(folder)
    with locked(folder, busy="another shrink is running there; wait, or give another output_dir"):
        summary = _go_on(task, plan, console)
        write_json(finished, summary)
    print_summary(task, summary, console=given)
    return summary


def _go_on(task: Shrink, plan: dict[str, Any] | None, console: Console) -> dict[str, Any]:
    """All phases that are not finished yet, and the model; returns summary.json. plan: of a new shrink."""
    folder, folders = task.folder, _open(task, plan)
    for number, here in enumerate(folders):
        before = folders[number - 1] if number else None
        _phase(task, here, before, folders[-1].phase, console)
        write_metrics(folder, folders[: number + 1])
    summary = summarise(task, read_json(folder / "phases.json"), folders)
    _save(task, folders[-1], summary)
    if task.settings.keep == "last":
        folders[-1].drop_weights()
    return summary


def plan_phases(task: Shrink) -> dict[str, Any]:
    """What phases.json holds: the phases, and what is known of the original model. Raises UserError for a size that
    the model cannot have."""
    model: Any = model_for_shapes(task.run)
    original = count_parameters(model)
    check(model, task.prune)
    target = asked_parameters(model, task.prune)
    phases = phases_of(
        original,
        target,
        task.run.max_steps,
        interleaves=task.settings.interleaves,
        schedule=task.settings.schedule,
        shares=task.settings.shares,
        step_tokens=None if task.settings.tokens is None else task.run.sequences_per_step * task.run.max_length,
    )
    if len(phases) > 1 and task.prune.method in ONCE:
        raise UserError(f"prune.method: {task.prune.method} prunes a model only once; set interleaves: 1")
    if len(phases) > 1 and task.settings.keep_moments:
        _check_moments(task)
    return {
        "original_parameters": original,
        "original_shapes": [shape.overrides() for shape in shapes_of(model)],
        "original_layer_parameters": layer_parameters(model),
        "target_parameters": target,
        "phases": [dataclasses.asdict(phase) for phase in phases],
    }


def _check_moments(task: Shrink) -> None:
    """Raise UserError where moments cannot survive, now rather than when the first phase has been trained."""
    prune, optim = task.prune, task.run.optim
    if prune.method in ("shortgpt", "sheared") or (prune.method == "flap" and prune.flap_compensation):
        mend = ", or prune.flap_compensation: false" if prune.method == "flap" else ""
        raise UserError(
            f"keep_moments: {prune.method} changes more of a model than taking components out, so moments cannot "
            f"survive it; set keep_moments: false{mend}"
        )
    if any(name in optim for name in ("adafactor", "8bit", "galore", "lomo", "ademamix")):
        raise UserError(
            f"keep_moments: the state of optim: {optim} cannot be cut; set train.optim: adamw_torch, or keep_moments: "
            "false"
        )


def phase_config(task: Shrink, here: PhaseFolder) -> RunConfig:
    """The run that trains a phase; its losses by source are compared with those of the original."""
    loading = task.run.dynamic_loading
    if loading.every and not loading.reference_losses:
        measured = read_json(task.folder / FIRST)["reference_losses"]
        loading = dataclasses.replace(loading, reference_losses=tuple(measured))
    return dataclasses.replace(
        task.run,
        dynamic_loading=loading,
        model=str(here.pruned),
        output_dir=str(here.train),
        phase=(here.phase.first, here.phase.end),
    )


def _make(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file; give a folder")
    there = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else set()
    if there and "phases.json" not in there:
        raise UserError(f"output_dir: {folder} holds something else; give another")
    with plain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _open(task: Shrink, plan: dict[str, Any] | None) -> list[PhaseFolder]:
    """The phases' folders, of a shrink that begins (with `plan`) or goes on."""
    folder = task.folder
    if plan is not None:
        write_json(folder / "phases.json", plan)
        write_text(folder / "config.yaml", dump_values(task.to_dict()))
        write_json(folder / "environment.json", describe_environment())
    folders = [PhaseFolder(folder, Phase(**phase)) for phase in read_json(folder / "phases.json")["phases"]]
    # A finished training's folder, too: what the next phase is pruned on is compared with its data once more.
    for place in (folder, *(place for one in folders for place in (one.path, one.train))):
        remove_unfinished(place)
    return folders


def _phase(task: Shrink, here: PhaseFolder, before: PhaseFolder | None, last: Phase, console: Console) -> None:
    phase = here.phase
    title = f"phase {phase.number} of {last.number}"
    if not here.facts.exists():
        total = prune_settings(task, phase, last.number).iterations

        def heard(step: PruneStep) -> None:
            of = f" of {total}" if total else ""
            status.update(f"{title}: pruning, iteration {step.iteration}{of}, {step.parameters:,} parameters")

        with console.status(f"{title}: pruning to {phase.parameters:,} parameters") as status:
            prune_phase(task, here, before, last, heard)
        clear_device_cache(garbage_collection=True)
        _tell(here, title, console)
    if before and task.settings.keep == "last":
        before.drop_weights()
    if not here.summary.exists():
        if before:
            here.put_checkpoint()
        train_one(phase_config(task, here), resume=bool(list_checkpoints(here.train)), lean=True)
        clear_device_cache(garbage_collection=True)


def _tell(here: PhaseFolder, title: str, console: Console) -> None:
    facts, phase = read_json(here.facts), here.phase
    lost = 1 - facts["parameters"] / facts["parameters_before"]
    losses = [figures.loss(facts[f"eval_loss_{when}_pruning"]) for when in ("before", "after")]
    console.print(
        f"{title}: {facts['parameters']:,} parameters ({lost:.2%} fewer), loss {losses[0]} -> {losses[1]}; training "
        f"steps {phase.first + 1} to {phase.end}",
        highlight=False,
        soft_wrap=True,
    )


def _save(task: Shrink, last: PhaseFolder, summary: dict[str, Any]) -> None:
    run = task.run
    target = task.folder / "model"
    if target.exists():  # whole, or not there
        return
    code = run.trust_remote_code
    model = load_model(str(last.trained), dtype=run.dtype, trust_remote_code=code)
    tokenizer = load_tokenizer(str(last.trained), trust_remote_code=code)
    save_pruned(model, tokenizer, target, card=shrunk_card(model, task, summary))


def _check_same_config(task: Shrink) -> None:
    path = task.folder / "config.yaml"
    before = load_shrink(path)
    old, new = _flat(before.to_dict()), _flat(task.to_dict())
    # A mapping that is empty, or not given, has keys of its own in one of the two alone.
    changed = [key for key in {**new, **old} if new.get(key) != old.get(key) and key not in FREE]
    changed = [key for key in changed if not _is_elsewhere(key, before, task)]
    if changed:
        raise UserError(
            f"{path}: {changed[0]} was {old.get(changed[0])!r} and is now {new.get(changed[0])!r}; a shrink that goes "
            "on keeps its settings (give another output_dir for a new one)"
        )


def _is_elsewhere(key: str, before: Shrink, task: Shrink) -> bool:
    """Whether a setting, by its dotted name, names what it did, at another place."""
    of_a_run = key.removeprefix("train.").partition(".")[0]
    return is_elsewhere(of_a_run, before.run, task.run)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
