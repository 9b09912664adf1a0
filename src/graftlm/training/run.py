"""`graftlm train`: one run from a config to a folder that explains itself."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from graftlm.configuring import config_to_dict
from graftlm.errors import UserError
from graftlm.files import read_json, write_json
from graftlm.methods import make_method
from graftlm.methods.base import Method
from graftlm.models import check_context, check_vocabulary, load_model, load_skeleton, load_tokenizer
from graftlm.parts import count_parameters
from graftlm.reporting import figures
from graftlm.reporting.report import make_report
from graftlm.reporting.table import print_summary
from graftlm.sharding import shard_model
from graftlm.training import distributed
from graftlm.training.arguments import check_settings, fuse_loss, training_arguments
from graftlm.training.config import RunConfig
from graftlm.training.control import run_control
from graftlm.training.data import PreparedData, prepare_data
from graftlm.training.distributed import agree, is_main, on_main, sharing_errors, taking_turns
from graftlm.training.estimates import compare_plan, estimate, remedies
from graftlm.training.finishing import Activations, finish, mean_activations, renew_card
from graftlm.training.metrics import Display, MetricsLog
from graftlm.training.run_folder import alone_in, check_same_config, check_same_data, open_folder
from graftlm.training.run_trainer import RunTrainer

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
"""What gloo says when a process is gone."""


def train(config: RunConfig, *, resume: bool = False) -> Path:
    """Train as `config` says; returns the run folder. With `control`, plain training follows in a process of its own.

    Under a launcher (torchrun) every process calls it, and the first one writes and talks.
    Raises UserError for anything a person can mend; what was finished before stays.
    """
    distributed.join(config.distributed)
    same = "start every process from the same file and with the same arguments"
    agree("the settings", config_to_dict(config), same)
    check_settings(config)  # before a folder is made
    run = Path(config.output_dir)
    with alone_in(run):
        _train_with_control(config, run, resume)
    distributed.leave()
    return run


def _train_with_control(config: RunConfig, run: Path, resume: bool) -> None:
    """What is still to be done of both, and the report; the caller holds the folder."""
    finished = run / "summary.json"
    if resume and on_main(finished.exists):
        on_main(lambda: check_same_config(config, run))
    else:
        with _other_processes(run):
            _train_one(config, resume=resume)
    summary = on_main(lambda: read_json(finished))
    if config.control and summary.get("control") is None:
        starts = [stage["step"] for stage in summary["stages"]]
        with _other_processes(run):
            summary["control"] = run_control(config, starts, train_one, resume=resume)
        # The card first: a kill in between then leaves both to be done again.
        on_main(lambda: renew_card(summary, config, run / "model"))
        on_main(lambda: write_json(finished, summary))
    if is_main():
        make_report(run)
        print_summary(summary, run)


@contextlib.contextmanager
def _other_processes(run: Path) -> Iterator[None]:
    """Say it plainly when another process of the run is gone."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        gone = isinstance(error, torch.distributed.DistBackendError) or any(words in text for words in LOST_PEER)
        if not gone or distributed.world_size() == 1:
            raise
        raise UserError(
            f"another process of {run} stopped (its own error says why); the last checkpoint stands, and --resume goes "
            "on from it"
        ) from error


def train_one(config: RunConfig, *, resume: bool = False, lean: bool = False) -> dict[str, Any]:
    """One run without its control; returns what it wrote to summary.json. `lean`: without plan and distributions of
    activations, which only a report of this run would show."""
    check_settings(config)
    with alone_in(Path(config.output_dir)):
        return _train_one(config, resume=resume, lean=lean)


def _train_one(config: RunConfig, *, resume: bool, lean: bool = False) -> dict[str, Any]:
    run = Path(config.output_dir)
    checkpoint = on_main(lambda: open_folder(config, run, resume))
    set_seed(config.seed)
    code = {"trust_remote_code": config.trust_remote_code}
    with taking_turns():
        tokenizer = load_tokenizer(config.model, chat_template=config.chat_template, **code)
        data = prepare_data(config, tokenizer, progress=is_main())
    same = (data.content() if distributed.world_size() > 1 else None) or data.fingerprint
    seen = {"fingerprint": same, "sequences": data.statistics.blocks, "tokens": data.statistics.tokens}
    agree("the training data", seen, "give every machine the same files and tokenizer")
    on_main(lambda: check_same_data(run, data, goes_on=checkpoint is not None or config.phase is not None))
    with sharing_errors():
        model = _open_model(config)
        check_vocabulary(model, tokenizer)
        too_long = check_context(model, config.max_length)
    from_first = any(distributed.gathered(next(model.parameters()).is_meta))
    title = "control" if run.name == "control" else figures.method_name(config.method)
    display = Display(title, Console(stderr=True, quiet=not is_main()))
    _tell_data(display, data)
    planned = None
    with sharing_errors():
        if is_main() and not lean:
            found = data.statistics
            planned = estimate(
                config,
                model,
                found.blocks,
                evaluation_blocks=found.evaluation_blocks,
                padded_length=found.padded_length,
                longest=found.longest,
            )
    total_parameters = count_parameters(model)
    use_cache = model.config.use_cache
    model.config.use_cache = False  # packed documents are kept apart only without a cache
    with sharing_errors():
        fused_loss = fuse_loss(config, model, _open_teacher(config, tokenizer))
    if config.distributed.strategy == "fsdp2":
        with sharing_errors():
            _shard(config, model, from_first)
    with sharing_errors():
        method = make_method(model, config)
    trainer = _make_trainer(config, run, model, data, display, method)
    if too_long:
        display.say(f"note: {too_long}")
        trainer.notes.append(too_long)
    if not is_main():  # dropout: every process has its own random numbers
        torch.manual_seed(config.seed + distributed.rank())
    before = None
    assesses = config.method == "apex" and config.apex.assessment in ("rank", "average")
    if not lean and (checkpoint or not assesses):
        before = _activations(trainer, config)
    if method is not None:
        with sharing_errors(), trainer.meter.timed():
            method.prepare()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory at step {trainer.state.global_step + 1}{remedies(planned)}; start again with another "
            "output_dir (only a run with the same settings is resumed)"
        ) from error
    finally:
        display.stop()
    if trainer.activations is not None and not lean:
        before = trainer.activations
    summary = finish(trainer, config, data, tokenizer, before, use_cache)
    if fused_loss is not None:
        fused_loss.close()
    summary["total_parameters"] = total_parameters
    if planned is not None:
        summary["plan"] = compare_plan(planned, summary)
    on_main(lambda: write_json(run / "summary.json", summary))
    return summary


def _activations(trainer: RunTrainer, config: RunConfig) -> Activations | None:
    """For the report. None, and a note, for a family whose heads and channels are not known, which only APEX needs."""
    try:
        return mean_activations(trainer, config)[0]
    except UserError as error:
        if config.method == "apex":
            raise
        trainer.notes.append(f"the report has no activations: {error}")
        return None


def _open_model(config: RunConfig) -> PreTrainedModel:
    """The model; under fsdp2 without weights on all processes but the first (where the file's kind allows it), so that
    a machine's memory holds them once."""
    spread = config.distributed.strategy == "fsdp2" and not is_main()
    skeleton = load_skeleton(config.model, **config.opened_with) if spread else None
    return load_model(config.model, **config.opened_with) if skeleton is None else skeleton


def _open_teacher(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """The model to distil from. Raises UserError where its tokens are others than the model's."""
    told = config.distillation
    if told.teacher is None:
        return None
    code = config.trust_remote_code
    if load_tokenizer(told.teacher, trust_remote_code=code).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"distillation.teacher: {told.teacher} has another vocabulary than {config.model}; choose one of its family"
        )
    return load_model(
        told.teacher, dtype=told.dtype, attn_implementation=config.attn_implementation, trust_remote_code=code
    )


def _shard(config: RunConfig, model: PreTrainedModel, from_first: bool) -> None:
    """FSDP2 in place of what accelerate would do, which cannot lay matrices as APEX needs them."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    shard_model(
        model,
        device,
        mixed=config.method == "apex",
        followers=config.apex.trains == "half",
        bf16=config.bf16,
        compile_layers=config.torch_compile,
        from_first=from_first,
    )
    setattr(model, "_is_accelerate_prepared", True)  # noqa: B010 - accelerate then takes it as it is


def _tell_data(display: Display, data: PreparedData) -> None:
    found = data.statistics
    known = (
        f"{found.documents:,} documents, {found.tokens:,} tokens, {found.blocks:,} sequences; " if found.tokens else ""
    )
    display.say(
        f"data: {known}supervised {found.supervised_share:.1%} of the tokens, truncated {found.truncated_share:.1%} of "
        "the documents"
    )
    for note in found.notes:
        display.say(f"note: {note}")


def _make_trainer(
    config: RunConfig,
    run: Path,
    model: PreTrainedModel,
    data: PreparedData,
    display: Display,
    method: Method | None,
) -> RunTrainer:
    apex = replace(config.apex, seed=config.seed) if config.apex.seed is None else config.apex
    trainer = RunTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=data.train,
        data_collator=data.collator,
        apex=apex if config.method == "apex" else None,
        run=run,
        evaluation=data.evaluation,
        evaluation_batch_size=config.per_device_eval_batch_size,
        display=display,
        eval_every=config.eval_steps,
        eval_at=config.stage_starts[1:],
        save_every=config.save_steps,
        method=method,
        reweighting=config.reweighting,
        phase=config.phase,
        dynamic_loading=config.dynamic_loading,
    )
    if config.method != "apex" and config.stage_starts:  # a control; others have no stages to follow
        trainer.schedule_config = config.apex
        trainer.stage_starts = list(config.stage_starts)
    trainer.metrics = MetricsLog(run / "metrics.jsonl", write=is_main())
    return trainer
