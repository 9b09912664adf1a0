"""Training data that is tokenised and packed while training, for data that is read once or never ends."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from graftlm.errors import UserError
from graftlm.training.config import RunConfig
from graftlm.training.data.blocks import BlockDataset, SourceBlocks, evaluation_dataset, not_evaluated
from graftlm.training.data.materialise import nothing_left
from graftlm.training.data.mixture import interleave
from graftlm.training.data.packing import Block
from graftlm.training.data.pipeline import HoldOutRule, SourcePipeline
from graftlm.training.data.statistics import Counts, DataStatistics, left_out, truncation

SAMPLE_BLOCKS = 64
"""Blocks of a stream that are looked at beforehand, for the shares that are printed."""

BlockStream = Callable[[], Iterator[Block]]


class StreamedBlocks(IterableDataset[dict[str, np.ndarray]]):
    """Items of several sources, interleaved by weight, again and again without an end. Iterating anew gives the same
    items in the same order.

    So skipping the first n batches resumes a run exactly (they are tokenised again, not trained on), and no pass over
    the data ends in a step of its own. Order is that of the data: shuffle the files beforehand if they are sorted.
    Ranks: accelerate's sharding (dispatch_batches=False) lets each read everything and take its share of every batch;
    its dispatching fails on batches of unequal length. Loader workers each read everything and hand on their share.
    """

    def __init__(self, streams: Sequence[BlockStream], weights: Sequence[float], seed: int) -> None:
        self.streams, self.weights, self.seed = list(streams), list(weights), seed

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """(source, block) in order, each once."""
        return interleave([stream() for stream in self.streams], self.weights, self.seed, len)

    def one_pass(self) -> Iterator[dict[str, np.ndarray]]:
        """Every item once."""
        return (block.item() for _, block in self.blocks())

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        worker = get_worker_info()
        passes = itertools.chain.from_iterable(self.blocks() for _ in itertools.count())
        for number, (_, block) in enumerate(passes):
            if worker is None or number % worker.num_workers == worker.id:
                yield block.item()


def prepare_stream(
    config: RunConfig,
    pipelines: Sequence[SourcePipeline],
    evaluated: Sequence[SourcePipeline],
) -> tuple[StreamedBlocks, BlockDataset | None, DataStatistics]:
    """Training stream, evaluation data (the first held-out blocks, kept in memory) and statistics, without a cache."""
    fraction = 0.0 if evaluated else config.eval_fraction
    rule = HoldOutRule(fraction)
    counts = [Counts() for _ in pipelines]
    weights = [1.0 if source.weight is None else source.weight for source in config.data]
    streams = [partial(_training_blocks, pipeline, rule) for pipeline in pipelines]
    train = StreamedBlocks(streams, weights, config.seed)
    sampled = StreamedBlocks([partial(s, c) for s, c in zip(streams, counts, strict=True)], weights, config.seed)
    taken = list(itertools.islice(sampled.blocks(), SAMPLE_BLOCKS))
    for number in set(range(len(streams))) - {source for source, _ in taken}:
        # A source without a block would end every pass where it is asked for its first.
        alone = Counts()
        if next(streams[number](alone), None) is None:
            raise nothing_left(pipelines[number], alone)
    sample = [block for _, block in taken]

    evaluation, notes = None, [f"streaming: shares and counts are those of the first {len(sample)} blocks"]
    if evaluated or fraction:
        kept = [first_blocks(pipeline, rule) for pipeline in evaluated or pipelines]
        evaluation = evaluation_dataset(kept, config.eval_data or config.data, config.eval_max_blocks)
        notes += not_evaluated(kept, config.eval_data or config.data, evaluation)
    notes += left_out([source.path for source in config.data], counts)
    tokens = sum(len(block) for block in sample)
    supervised = sum(block.supervised_tokens for block in sample)
    statistics = DataStatistics(
        documents=None,
        tokens=None,
        blocks=None,
        supervised_tokens=None,
        supervised_share=supervised / tokens,
        held_out_documents=0,
        evaluation_blocks=len(evaluation) if evaluation is not None else 0,
        notes=notes,
        **truncation(counts),
    )
    return train, evaluation, statistics


def _training_blocks(pipeline: SourcePipeline, rule: HoldOutRule, counts: Counts | None = None) -> Iterator[Block]:
    return (block for _, block in pipeline.blocks(counts or Counts(), rule, only="train"))


def first_blocks(pipeline: SourcePipeline, rule: HoldOutRule) -> SourceBlocks:
    """The first eval_max_blocks blocks of an evaluation source, or of the documents that the rule holds back."""
    counts = Counts()
    stream = pipeline.blocks(counts, rule, only="held_out") if rule.fraction else pipeline.blocks(counts)
    blocks = [block for _, block in itertools.islice(stream, pipeline.config.eval_max_blocks)]
    if not blocks and not rule.fraction:
        raise nothing_left(pipeline, counts)
    if not blocks:
        raise UserError(
            f"eval_fraction: no document of {pipeline.source.path} could be held back while streaming; set eval_data, "
            "a larger eval_fraction, or eval_fraction: 0"
        )
    sizes = np.asarray([[len(block), block.supervised_tokens] for block in blocks], np.int32)
    return SourceBlocks(blocks, sizes, blocks, np.arange(len(blocks)), counts)
