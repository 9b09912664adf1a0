"""prepare_data: from a RunConfig to what a trainer reads, and the numbers that describe it."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from graftlm.errors import UserError
from graftlm.training.config import RunConfig
from graftlm.training.data.blocks import BlockDataset, evaluation_dataset
from graftlm.training.data.cache import cache_key, tokenizer_fingerprint
from graftlm.training.data.collate import Collator
from graftlm.training.data.dynamic import DynamicBlocks
from graftlm.training.data.materialise import evaluation_blocks, prepare_cached
from graftlm.training.data.pipeline import HoldOutRule, SourcePipeline
from graftlm.training.data.readers import ROW_SUFFIXES, suffix
from graftlm.training.data.sources import source_bytes, source_choice, source_content
from graftlm.training.data.statistics import DataStatistics
from graftlm.training.data.streaming import StreamedBlocks, first_blocks, prepare_stream

HASHED_AT_MOST = 2**33
"""Bytes of data that are read only to know them again: some seconds' worth."""


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
    fingerprint: str
    """Changes when a file (its path or time), the tokenizer or a setting does that decides what is read."""
    content: Callable[[], str | None] = field(default=lambda: None)
    """As fingerprint, by what is in the files: the same after they were copied. Reads them. None where they are on the
    Hub, streamed, or more than HASHED_AT_MOST."""
    selection: Dataset[dict[str, np.ndarray]] | None = None
    """As evaluation, of config.selection_data."""


def prepare_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, progress: bool = True) -> PreparedData:
    """Read, tokenise and pack the data of a run, from the cache where it has been done before.

    Evaluation data come from config.eval_data, else from training documents held back by a hash of their number; the
    blocks evaluated are spread evenly over them. progress: a bar on stderr.

    Raises UserError for anything wrong with files, rows, columns, formats, the chat template, and where nothing is left
    to train on.
    """
    pipelines = [SourcePipeline(source, config, tokenizer) for source in config.data]
    with _named("eval_data"):
        evaluated = [SourcePipeline(source, config, tokenizer) for source in config.eval_data]
    with _named("selection_data"):
        selected = [SourcePipeline(source, config, tokenizer) for source in config.selection_data]
    task = _task(config, [*pipelines, *evaluated, *selected])
    train: StreamedBlocks | BlockDataset | DynamicBlocks
    if config.streaming:
        train, evaluation, statistics = prepare_stream(config, pipelines, evaluated)
    else:
        train, evaluation, statistics = prepare_cached(config, pipelines, evaluated, progress)
    selection = None
    if selected:
        if config.streaming:
            kept = [first_blocks(one, HoldOutRule()) for one in selected]
        else:
            kept = [evaluation_blocks(one, progress) for one in selected]
        selection = evaluation_dataset(kept, config.selection_data, config.eval_max_blocks)
    flash = (config.attn_implementation or "").startswith(("flash", "kernels-community/"))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    read = [pipeline.settings() for pipeline in [*pipelines, *evaluated, *selected]]
    fingerprint = cache_key(tokenizer=tokenizer_fingerprint(tokenizer), sources=read, seed=config.seed)
    by_content = functools.partial(_content, [*pipelines, *evaluated, *selected], tokenizer, config)
    return PreparedData(
        train, evaluation, Collator(pad, flatten=flash), statistics, task, fingerprint, by_content, selection
    )


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    """What is wrong with a source is said of the key that it stands under."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"^data(?=[:.])", key, str(error))) from error


def _content(pipelines: Sequence[SourcePipeline], tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> str | None:
    sources = [pipeline.source for pipeline in pipelines]
    if config.streaming or sum(source_bytes(source) for source in sources) > HASHED_AT_MOST:
        return None
    contents = [source_content(source) for source in sources]
    if None in contents:
        return None
    read = [
        {**pipeline.settings(), "source": {**source_choice(pipeline.source), "content": content, **_read_as(pipeline)}}
        for pipeline, content in zip(pipelines, contents, strict=True)
    ]
    return cache_key(tokenizer=tokenizer_fingerprint(tokenizer), sources=read, seed=config.seed)


def _read_as(pipeline: SourcePipeline) -> dict[str, str]:
    """How the bytes of a single file are read, where its name says so and not what is in it; rows are left unsaid."""
    path = Path(pipeline.source.path).expanduser()
    return {"read": "text"} if path.is_file() and suffix(path) not in ROW_SUFFIXES else {}


def _task(config: RunConfig, pipelines: Sequence[SourcePipeline]) -> Literal["cpt", "sft"]:
    tasks = {pipeline.task: pipeline.source.path for pipeline in pipelines}
    if len(tasks) == 2:
        raise UserError(
            f"data: {tasks['cpt']} is text and {tasks['sft']} conversations, whose losses cannot be mixed; train on "
            "one after the other, or set format"
        )
    task = pipelines[0].task
    if config.task == "sft" and task == "cpt":
        raise UserError(f"task: sft needs conversations, and {tasks['cpt']} is text; set task: cpt, or format")
    if config.task == "cpt" and task == "sft":
        raise UserError(
            f"task: cpt needs text, and {tasks['sft']} are conversations; set task: sft (with assistant_only_loss: "
            "false to train on every token)"
        )
    return task
