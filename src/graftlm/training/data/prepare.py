"""prepare_data: from a RunConfig to what a trainer reads, and the numbers that describe it."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from graftlm.errors import UserError
from graftlm.training.config import RunConfig, SourceConfig
from graftlm.training.data.cache import BlockFile, cache_key, cache_root, cached_blocks, tokenizer_fingerprint
from graftlm.training.data.collate import Collator
from graftlm.training.data.mixture import mixed_index
from graftlm.training.data.packing import Block
from graftlm.training.data.pipeline import (
    HeldOut,
    SourcePipeline,
    hold_out_rule,
    hold_out_score,
    nothing_held_out,
)
from graftlm.training.data.statistics import Counts, DataStatistics, SourceStatistics
from graftlm.training.data.torch_datasets import BlockDataset, StreamedBlocks

SAMPLE_BLOCKS = 64
"""Blocks of a stream that are looked at beforehand, for the shares that are printed."""


@dataclass(frozen=True)
class PreparedData:
    """Data ready for a trainer. Items: input_ids, labels and, where documents are kept apart, position_ids."""

    train: Dataset[dict[str, np.ndarray]] | IterableDataset[dict[str, np.ndarray]]
    """Map-style, or with config.streaming an iterable without a length."""
    evaluation: Dataset[dict[str, np.ndarray]] | None
    """Map-style; None if eval_fraction is 0 and there is no eval_data, or too little data to hold any back."""
    collator: Collator
    statistics: DataStatistics
    task: Literal["cpt", "sft"]


@dataclass(frozen=True)
class _Blocks:
    """A source's training blocks and its evaluation blocks."""

    train: Sequence[Block]
    train_sizes: np.ndarray
    """int32 [blocks, 2]: tokens and supervised tokens"""
    evaluation: Sequence[Block]
    evaluation_numbers: np.ndarray
    """int [n]: which of them"""
    counts: Counts


def prepare_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, progress: bool = True) -> PreparedData:
    """Read, tokenise and pack the data of a run, from the cache where it has been done before.

    Evaluation data come from config.eval_data, else from training documents held back by a hash of their number and
    the seed; the blocks evaluated are spread evenly over them. progress: a bar on stderr.

    Raises UserError for anything wrong with files, rows, columns, formats, the chat template, and where nothing is left
    to train on.
    """
    pipelines = [SourcePipeline(source, config, tokenizer) for source in config.data]
    evaluated = [SourcePipeline(source, config, tokenizer) for source in config.eval_data]
    task = _task(config, [*pipelines, *evaluated])
    prepare = _prepare_stream if config.streaming else _prepare_cached
    train, evaluation, statistics = prepare(config, tokenizer, pipelines, evaluated, progress)
    flash = (config.attn_implementation or "").startswith(("flash", "kernels-community/"))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return PreparedData(train, evaluation, Collator(pad, flatten=flash), statistics, task)


def _task(config: RunConfig, pipelines: Sequence[SourcePipeline]) -> Literal["cpt", "sft"]:
    tasks = {pipeline.task: pipeline.source.path for pipeline in pipelines}
    if len(tasks) == 2:
        raise UserError(
            f"data: {tasks['cpt']} is text and {tasks['sft']} conversations, whose losses cannot be mixed; train on one "
            "after the other, or set format"
        )
    task = pipelines[0].task
    if config.task == "sft" and task == "cpt":
        raise UserError(f"task: sft needs conversations, and {tasks['cpt']} is text; set task: cpt, or format")
    if config.task == "cpt" and task == "sft":
        raise UserError(
            f"task: cpt needs text, and {tasks['sft']} are conversations; set task: sft (with assistant_only_loss: false "
            "to train on every token)"
        )
    return task


def _prepare_cached(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    pipelines: Sequence[SourcePipeline],
    evaluated: Sequence[SourcePipeline],
    progress: bool,
) -> tuple[BlockDataset, BlockDataset | None, DataStatistics]:
    notes: list[str] = []
    fingerprint = tokenizer_fingerprint(tokenizer)
    fraction = 0.0 if evaluated else config.eval_fraction
    sources = [_source_blocks(pipeline, fraction, fingerprint, notes, progress) for pipeline in pipelines]
    held = sources
    if evaluated:
        held = [_evaluation_blocks(pipeline, fingerprint, progress) for pipeline in evaluated]

    sizes = [source.train_sizes for source in sources]
    weights = [source.weight for source in config.data]
    index = mixed_index([size[:, 0] for size in sizes], weights, config.seed)
    train = BlockDataset([source.train for source in sources], index)
    evaluation = _evaluation(held, config.eval_data or config.data, config.eval_max_blocks)
    statistics = _statistics(config, sources, index, evaluation, notes)
    return train, evaluation, statistics


def _source_blocks(
    pipeline: SourcePipeline, fraction: float, fingerprint: str, notes: list[str], progress: bool
) -> _Blocks:
    """Training and held-out blocks of one source, with words on how they were split in `notes`."""
    config, path = pipeline.config, pipeline.source.path
    key: dict[str, Any] = {"fraction": fraction, "seed": config.seed} if fraction else {}
    rule = hold_out_rule(fraction, config.seed) if fraction else nothing_held_out
    train, held, counts = _cached(pipeline, rule, key, fingerprint, progress)
    if fraction and not held and counts.documents > 1:
        # Few documents, and the hash picked none: take the one it comes closest to.
        chosen = min(range(1, counts.documents + counts.empty), key=partial(hold_out_score, seed=config.seed))
        train, held, counts = _cached(pipeline, chosen.__eq__, key | {"chosen": chosen}, fingerprint, progress)
    if not len(train):
        raise _nothing_to_train_on(pipeline, counts)
    sizes = train.sizes()
    if not fraction or len(held):
        if fraction and (share := held.sizes()[:, 0].sum() / (held.sizes()[:, 0].sum() + sizes[:, 0].sum())) > 0.2:
            notes.append(f"{path}: {share:.0%} of the tokens are held back for evaluation, since documents are few; set eval_data")
        return _Blocks(train, sizes, held, np.arange(len(held)), counts)
    last = min(config.eval_max_blocks, max(1, round(fraction * len(train))), len(train) - 1)
    if last:
        notes.append(f"{path}: too few documents to hold one back: its last {last} of {len(train)} blocks are evaluated")
    else:
        notes.append(f"{path}: a single block, so nothing is held back for evaluation; set eval_data")
    keep = len(train) - last
    return _Blocks(train, sizes[:keep], train, np.arange(keep, len(train)), counts)


def _evaluation_blocks(pipeline: SourcePipeline, fingerprint: str, progress: bool) -> _Blocks:
    blocks, _, counts = _cached(pipeline, nothing_held_out, {}, fingerprint, progress)
    if not len(blocks):
        raise _nothing_to_train_on(pipeline, counts)
    return _Blocks(blocks, blocks.sizes(), blocks, np.arange(len(blocks)), counts)


def _cached(
    pipeline: SourcePipeline, rule: HeldOut, key: dict[str, Any], fingerprint: str, progress: bool
) -> tuple[BlockFile, BlockFile, Counts]:
    counts = Counts()
    folder = cache_root(pipeline.config.cache_dir) / cache_key(tokenizer=fingerprint, **pipeline.settings(), **key)
    blocks = _with_progress(pipeline.blocks(counts, rule), pipeline.source, progress)
    return cached_blocks(folder, blocks, counts, pipeline.config.max_length)


def _with_progress(
    blocks: Iterator[tuple[bool, Block]], source: SourceConfig, progress: bool
) -> Iterator[tuple[bool, Block]]:
    bar = Progress(
        SpinnerColumn(),
        TextColumn("tokenising {task.description}: {task.completed:,.0f} tokens, {task.fields[rate]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )
    with bar:
        task = bar.add_task(source.path, total=None, rate=0.0)
        for held, block in blocks:
            bar.update(task, advance=len(block), rate=bar.tasks[task].speed or 0.0)
            yield held, block


def _nothing_to_train_on(pipeline: SourcePipeline, counts: Counts) -> UserError:
    path = pipeline.source.path
    if pipeline.task == "cpt":
        return UserError(f"data: {path}: no block of at least 2 tokens in {counts.documents} documents; give more text")
    return UserError(
        f"data: {path}: no supervised token left, {counts.dropped} of {counts.documents} conversations were dropped; raise "
        "max_length, set truncation: truncate, or look at it with `graftlm data`"
    )


def _evaluation(
    sources: Sequence[_Blocks], configs: Sequence[SourceConfig], max_blocks: int
) -> BlockDataset | None:
    """At most max_blocks blocks: of each source a part in proportion to its weight, spread evenly over it."""
    total = sum(config.weight for config in configs)
    rows = []
    for number, (source, config) in enumerate(zip(sources, configs, strict=True)):
        available = source.evaluation_numbers
        count = min(len(available), max(1, round(max_blocks * config.weight / total)))
        picked = available[np.linspace(0, len(available) - 1, count).round().astype(int)] if count else available
        rows.append(np.stack([np.full(count, number), picked], axis=1))
    index = np.concatenate(rows)[:max_blocks]
    return BlockDataset([source.evaluation for source in sources], index) if len(index) else None
