"""A run's folder: whether a run may begin there, or go on, and on what."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from graftlm.configuring import config_to_dict, dump_yaml, load_config
from graftlm.environment import describe_environment
from graftlm.errors import UserError
from graftlm.files import locked, plain_disk_errors, read_json, remove_unfinished, write_json, write_text
from graftlm.identity import NAMED, SETTINGS, content_of, same_settings
from graftlm.training.checkpoints import check_checkpoint, list_checkpoints, saved_extra
from graftlm.training.config import SOURCE_KEYS, RunConfig, SourceConfig
from graftlm.training.data import PreparedData
from graftlm.training.distributed import on_main, world_size

# What may differ between a run and its --resume without changing a weight.
FREE_ON_RESUME = {"control", "save_total_limit", "report_to", "logging_steps", "per_device_eval_batch_size"}
FREE_ON_RESUME |= {"save_steps", "cache_dir", "output_dir"}
# So may these, as long as a step has the same sequences and checkpoints the same form; the checkpoint says.
OF_A_MICROBATCH = {"per_device_train_batch_size", "gradient_accumulation_steps", "distributed"}
FREE_ON_RESUME |= OF_A_MICROBATCH  # but where the loss, or the assessment, is of a micro-batch


@contextlib.contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Make the run folder and hold it, for all processes of a run: a second run would remove what the first is writing.
    Raises UserError while another run holds it."""
    with contextlib.ExitStack() as held:
        on_main(lambda: _hold(run, held))
        yield


def _hold(run: Path, held: contextlib.ExitStack) -> None:
    busy = "another run is training there; wait until it has ended, or give another output_dir"
    with plain_disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(run, busy=busy))


def open_folder(config: RunConfig, run: Path, resume: bool) -> Path | None:
    """Put a new run's settings into its folder, or find the checkpoint to go on from."""
    checkpoints = list_checkpoints(run)
    if (run / "summary.json").exists() or (checkpoints and not resume):
        state = "a finished run" if (run / "summary.json").exists() else "an unfinished run"
        mend = "" if state == "a finished run" else "go on with --resume, "
        raise UserError(f"{run} holds {state}: {mend}give another output_dir, or delete the folder")
    if resume and (run / "config.yaml").exists():
        check_same_config(config, run)
    if resume and not checkpoints:
        print(f"{run} has no checkpoint yet; starting from the beginning", file=sys.stderr)
    if config.phase is not None and config.phase[0] > 0 and not checkpoints:
        raise UserError(
            f"{run}: a phase that begins at step {config.phase[0]} goes on from a checkpoint, and there is none; such "
            "phases are for `graftlm shrink`"
        )
    if checkpoints:
        check_checkpoint(checkpoints[-1], sharded=config.distributed.strategy == "fsdp2")
        _check_step(checkpoints[-1], config)
    for folder in (run, run / "checkpoints"):
        remove_unfinished(folder)
    write_text(run / "config.yaml", dump_yaml(config))
    write_json(run / "environment.json", describe_environment())
    return checkpoints[-1] if checkpoints else None


def _check_step(checkpoint: Path, config: RunConfig) -> None:
    """Raise UserError where a step would not have the sequences that it had."""
    now = config.sequences_per_step * world_size()
    before = saved_extra(checkpoint)["run"].get("sequences_a_step", now)
    if before != now:
        raise UserError(
            f"{checkpoint}: a step had {before} sequences and would now have {now}; choose processes x "
            "per_device_train_batch_size x gradient_accumulation_steps that give as many as before"
        )


def check_same_config(config: RunConfig, run: Path) -> None:
    before = load_config(run / "config.yaml")
    old, new = config_to_dict(before), config_to_dict(config)
    free = FREE_ON_RESUME
    assessed = config.method == "apex" and config.apex.assess_per == "microbatch"
    if config.reweighting.strategy != "none" or assessed:
        free = free - OF_A_MICROBATCH
    changed = [key for key in new if new[key] != old.get(key) and key not in free]
    changed = [key for key in changed if not is_elsewhere(key, before, config, run / SETTINGS)]
    if changed:
        raise UserError(
            f"{run}/config.yaml: {changed[0]} was {old.get(changed[0])!r} and is now {new[changed[0]]!r}; a resumed "
            "run keeps its settings (give another output_dir for a new one)"
        )


def is_elsewhere(key: str, old: RunConfig, new: RunConfig, kept: Path | None = None) -> bool:
    """Whether a setting names what it did, at another place. kept: where a comparison says what was at a path that is
    gone, if it does."""
    if key not in NAMED:
        return False
    try:
        before = read_json(kept).get(key) if kept and kept.exists() else content_of(old, key)
    except UserError:  # the old data are gone; check_same_data still knows what was read of them
        return key in SOURCE_KEYS and _unplaced(getattr(old, key)) == _unplaced(getattr(new, key))
    return same_settings({key: before}, {key: content_of(new, key)})


def _unplaced(sources: Sequence[SourceConfig]) -> list[SourceConfig]:
    return [dataclasses.replace(source, path="") for source in sources]


def check_same_data(run: Path, data: PreparedData, *, goes_on: bool) -> None:
    """A resumed run, and a control, must see the tokens that the run began with."""
    for folder in [run] * goes_on + [run.parent] * (run.name == "control"):
        path = folder / "data.json"
        told = read_json(path) if path.exists() else {"fingerprint": data.fingerprint}
        if told["fingerprint"] != data.fingerprint and (told.get("content") or "none") != data.content():
            raise UserError(
                f"{folder}: the data (or the tokenizer) has changed since this run began, so it would not see the same "
                "tokens; put the files back as they were, or start again with another output_dir"
            )
    write_json(run / "data.json", {"fingerprint": data.fingerprint, "content": data.content()})
