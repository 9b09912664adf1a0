"""Map-style data from the cache: each source's blocks, split into training and evaluation, mixed by weight."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from graftlm.errors import UserError
from graftlm.files import cache_root
from graftlm.training.config import RunConfig, SourceConfig
from graftlm.training.data.blocks import BlockDataset, SourceBlocks, evaluation_dataset, not_evaluated
from graftlm.training.data.cache import BlockFile, cache_key, cached_blocks, tokenizer_fingerprint
from graftlm.training.data.dynamic import DynamicBlocks
from graftlm.training.data.mixture import index_of_epoch, mixed_index
from graftlm.training.data.packing import Block
from graftlm.training.data.pipeline import HeldOut, HoldOutRule, SourcePipeline, hold_out_score
from graftlm.training.data.statistics import Counts, DataStatistics, SourceStatistics, left_out, truncation
from graftlm.training.distributed import world_size

LARGE_SHARE = 0.2
"""A larger share of a source's tokens held back (few, long documents) is worth a note."""


def prepare_cached(
    config: RunConfig,
    pipelines: Sequence[SourcePipeline],
    evaluated: Sequence[SourcePipeline],
    progress: bool,
) -> tuple[BlockDataset | DynamicBlocks, BlockDataset | None, DataStatistics]:
    """Training data, evaluation data and statistics; builds the cache where it is missing."""
    notes: list[str] = []
    fingerprint = tokenizer_fingerprint(pipelines[0].tokenizer)
    fraction = 0.0 if evaluated else config.eval_fraction
    sources = [_source_blocks(pipeline, fraction, fingerprint, notes, progress) for pipeline in pipelines]
    held = sources
    if evaluated:
        held = [evaluation_blocks(pipeline, progress) for pipeline in evaluated]

    sizes = [source.train_sizes for source in sources]
    index = mixed_index([size[:, 0] for size in sizes], [source.weight for source in config.data], config.seed)
    of_epoch = None
    if len(sources) > 1 and config.data[0].weight is not None:
        of_epoch = partial(index_of_epoch, index, [len(size) for size in sizes], config.seed)
    train: BlockDataset | DynamicBlocks = BlockDataset([source.train for source in sources], index, of_epoch)
    if config.dynamic_loading.every:
        train = _dynamic(config, sources, held)
        notes.append("dynamic_loading: shares are those that it begins with")
    evaluation = evaluation_dataset(held, config.eval_data or config.data, config.eval_max_blocks)
    notes += not_evaluated(held, config.eval_data or config.data, evaluation)
    statistics = _statistics(config, sources, index, evaluation, notes)
    return train, evaluation, statistics


def _dynamic(config: RunConfig, sources: Sequence[SourceBlocks], held: Sequence[SourceBlocks]) -> DynamicBlocks:
    """As many blocks as the run takes. Raises UserError for a source of which nothing is held out."""
    held_out = []
    for source, blocks in zip(config.data, held, strict=True):
        one = evaluation_dataset([blocks], [source], config.dynamic_loading.sequences)
        if one is None:
            raise UserError(f"data: {source.path}: nothing of it is held out, as dynamic_loading needs; give eval_data")
        held_out.append(one)
    sizes = [source.train_sizes[:, 0] for source in sources]
    weights = [
        float(size.sum()) if one.weight is None else one.weight for one, size in zip(config.data, sizes, strict=True)
    ]
    step = config.sequences_per_step * world_size()
    blocks_of = [source.train for source in sources]
    return DynamicBlocks(blocks_of, sizes, weights, config.max_steps * step, config.seed, held_out)


def _source_blocks(
    pipeline: SourcePipeline, fraction: float, fingerprint: str, notes: list[str], progress: bool
) -> SourceBlocks:
    """Training and held-out blocks of one source, with words on how they were split in `notes`."""
    config, path = pipeline.config, pipeline.source.path
    key: dict[str, Any] = {"fraction": fraction} if fraction else {}
    rule = HoldOutRule(fraction)
    train, held, counts = _cached(pipeline, rule, key, fingerprint, progress)
    documents = counts.documents + counts.held_out_documents + counts.empty
    if fraction and documents - counts.empty > 1 and not (held and train):
        train, held, counts = _one_held_back(pipeline, documents, key, fingerprint, progress)
    if not len(train):
        raise nothing_left(pipeline, counts)
    sizes = train.sizes()
    if not fraction or len(held):
        held_tokens, tokens = (int(size[:, 0].sum()) for size in (held.sizes(), sizes))
        if (share := held_tokens / (held_tokens + tokens)) > max(fraction, LARGE_SHARE):
            notes.append(f"{path}: documents are few, so {share:.0%} of the tokens are held back; set eval_data")
        return SourceBlocks(train, sizes, held, np.arange(len(held)), counts)
    last = min(config.eval_max_blocks, max(1, round(fraction * len(train))), len(train) - 1)
    if last:
        notes.append(
            f"{path}: too few documents to hold one back: its last {last} of {len(train)} blocks are evaluated"
        )
    else:
        notes.append(f"{path}: a single block, so nothing is held back for evaluation; set eval_data")
    keep = len(train) - last
    return SourceBlocks(train, sizes[:keep], train, np.arange(keep, len(train)), counts)


def _one_held_back(
    pipeline: SourcePipeline, documents: int, key: dict[str, Any], fingerprint: str, progress: bool
) -> tuple[BlockFile, BlockFile, Counts]:
    """Where documents are few and the hash has picked none, or all: the one it comes closest to is held back, of those
    that have blocks, and none where only one has any."""

    def without(number: int) -> tuple[BlockFile, BlockFile, Counts]:
        return _cached(pipeline, number.__eq__, key | {"chosen": number}, fingerprint, progress)

    split = without(min(range(1, documents), key=hold_out_score))  # nearly always has blocks, as have the others
    if split[0] and split[1]:
        return split
    usable = sorted(pipeline.documents_with_blocks(), key=lambda number: (number == 0, hold_out_score(number)))
    return without(usable[0]) if len(usable) > 1 else _cached(pipeline, HoldOutRule(), {}, fingerprint, progress)


def evaluation_blocks(pipeline: SourcePipeline, progress: bool) -> SourceBlocks:
    """All of a source, for evaluation."""
    fingerprint = tokenizer_fingerprint(pipeline.tokenizer)
    blocks, _, counts = _cached(pipeline, HoldOutRule(), {}, fingerprint, progress)
    if not len(blocks):
        raise nothing_left(pipeline, counts)
    return SourceBlocks(blocks, blocks.sizes(), blocks, np.arange(len(blocks)), counts)


def _cached(
    pipeline: SourcePipeline, rule: HeldOut, key: dict[str, Any], fingerprint: str, progress: bool
) -> tuple[BlockFile, BlockFile, Counts]:
    counts = Counts()
    name = cache_key(tokenizer=fingerprint, **pipeline.settings(), **key)
    folder = cache_root(pipeline.config.cache_dir) / "blocks" / name
    blocks = _with_progress(pipeline.blocks(counts, rule), pipeline.source, progress)
    return cached_blocks(folder, blocks, counts, pipeline.config.max_length)


def _with_progress(
    blocks: Iterator[tuple[bool, Block]], source: SourceConfig, progress: bool
) -> Iterator[tuple[bool, Block]]:
    console = Console(stderr=True)
    bar = Progress(
        SpinnerColumn(),
        TextColumn("tokenising {task.description}: {task.completed:,.0f} tokens, {task.fields[rate]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        console=console,
        disable=not (progress and console.is_terminal),  # else its last line lands in the file
    )
    with bar:
        task = bar.add_task(source.path, total=None, rate=0.0)
        for held, block in blocks:
            bar.update(task, advance=len(block), rate=bar.tasks[task].speed or 0.0)
            yield held, block


def nothing_left(pipeline: SourcePipeline, counts: Counts) -> UserError:
    """The error for a source that gives no block."""
    path = pipeline.source.path
    if pipeline.task == "cpt":
        return UserError(f"data: {path}: no block of at least 2 tokens in {counts.documents} documents; give more text")
    return UserError(
        f"data: {path}: no supervised token left, {counts.dropped} of {counts.documents} conversations were dropped; "
        "raise max_length, set truncation: truncate, or look at it with `graftlm data`"
    )


def padded_length(lengths: np.ndarray, rows: int) -> float:
    """Mean over micro-batches of `rows` blocks, drawn at random, of the longest one's tokens.

    lengths: int [blocks], tokens of each."""
    rows = min(rows, len(lengths))
    drawn = np.random.default_rng(0).permutation(lengths)[: len(lengths) // rows * rows]
    return float(drawn.reshape(-1, rows).max(axis=1).mean())


def _statistics(
    config: RunConfig,
    sources: Sequence[SourceBlocks],
    index: np.ndarray,
    evaluation: BlockDataset | None,
    notes: list[str],
) -> DataStatistics:
    parts = []
    for number, (source, given) in enumerate(zip(sources, config.data, strict=True)):
        used = source.train_sizes[index[index[:, 0] == number, 1]].sum(axis=0, dtype=np.int64)
        parts.append((source, given, used, int((index[:, 0] == number).sum())))
    tokens = sum(int(used[0]) for _, _, used, _ in parts)
    supervised = sum(int(used[1]) for _, _, used, _ in parts)
    listed = []
    for source, given, used, blocks in parts:
        passes = blocks / len(source.train_sizes)
        documents = source.counts.documents - source.counts.dropped
        share = int(used[0]) / tokens
        listed.append(SourceStatistics(given.path, given.weight, documents, int(used[0]), blocks, share, passes))
        if passes < 1:
            notes.append(
                f"{given.path}: an epoch uses {passes:.1%} of its blocks, by its weight, the next epoch others"
            )
    counts = [source.counts for source in sources]
    lengths = np.concatenate([source.train_sizes[:, 0] for source in sources])
    return DataStatistics(
        documents=sum(part.documents for part in listed),
        tokens=tokens,
        blocks=len(index),
        supervised_tokens=supervised,
        supervised_share=supervised / tokens,
        held_out_documents=sum(count.held_out_documents for count in counts),
        evaluation_blocks=len(evaluation) if evaluation is not None else 0,
        longest=int(lengths.max()),
        padded_length=padded_length(lengths, config.per_device_train_batch_size),
        sources=listed,
        notes=notes + left_out([source.path for source in config.data], counts),
        **truncation(counts),
    )
