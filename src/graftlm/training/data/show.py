"""What the model will see: decoded blocks with the supervised tokens coloured, and the numbers beside them."""

import itertools
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from graftlm.samples import IGNORED
from graftlm.training.config import RunConfig
from graftlm.training.data.prepare import PreparedData, prepare_data
from graftlm.training.data.statistics import DataStatistics
from graftlm.training.data.streaming import StreamedBlocks

SUPERVISED, UNSUPERVISED, NOTE = "bold green", "dim", "cyan"


def show_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, count: int = 3, out: Console | None = None
) -> PreparedData:
    """Print `count` training blocks and the statistics. Prepares (and caches) the data as training would.

    Supervised tokens are green; where there is no colour they stand between » and «. Raises UserError as prepare_data.
    """
    out = out or Console()
    data = prepare_data(config, tokenizer)
    for number, item in enumerate(itertools.islice(_items(data), count), start=1):
        supervised = int((np.asarray(item["labels"]) != IGNORED).sum())
        out.rule(f"block {number}: {len(item['input_ids'])} tokens, {supervised} supervised", style=NOTE)
        out.print(decoded(item, tokenizer, marks=out.color_system is None or out.no_color), soft_wrap=True)
    out.rule(style=NOTE)
    out.print(statistics_table(data.statistics))
    for note in data.statistics.notes:
        out.print(Text(f"note: {note}", style=NOTE), soft_wrap=True)
    return data


def decoded(item: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, marks: bool = False) -> Text:
    """A block as text: runs of tokens by whether they are supervised, a line where a document begins that sees nothing
    before it. marks: » « around supervised runs, for output without colour."""
    ids, supervised = np.asarray(item["input_ids"]), np.asarray(item["labels"]) != IGNORED
    positions = item.get("position_ids")
    begins = np.asarray(positions) == 0 if positions is not None else np.arange(len(ids)) == 0
    cuts = np.flatnonzero(begins[1:] | (supervised[1:] != supervised[:-1])) + 1
    text = Text()
    for run in np.split(np.arange(len(ids)), cuts):
        first = int(run[0])
        if positions is not None and begins[first]:
            text.append(f"{'' if first == 0 else chr(10)}── document ──\n", style=NOTE)
        words = str(tokenizer.decode(ids[run].tolist()))
        style = SUPERVISED if supervised[first] else UNSUPERVISED
        text.append(f"»{words}«" if marks and supervised[first] else words, style=style)
    return text


def statistics_table(statistics: DataStatistics) -> Table:
    """One row a number, and one a source where there are several."""
    table = Table("data", "", show_header=False)

    def number(value: int | None) -> str:
        return "not known (streaming)" if value is None else f"{value:,}"

    table.add_row("documents", number(statistics.documents))
    table.add_row("tokens an epoch", number(statistics.tokens))
    table.add_row("blocks an epoch", number(statistics.blocks))
    table.add_row("supervised tokens", f"{number(statistics.supervised_tokens)} ({statistics.supervised_share:.1%})")
    table.add_row("truncated documents", f"{statistics.truncated_documents:,} ({statistics.truncated_share:.1%})")
    table.add_row("dropped documents", number(statistics.dropped))
    table.add_row("held-out documents", number(statistics.held_out_documents))
    table.add_row("evaluation blocks", number(statistics.evaluation_blocks))
    for source in statistics.sources if len(statistics.sources) > 1 else []:
        share = f"{source.share:.1%} of the tokens, {source.tokens:,} in {source.blocks:,} blocks"
        table.add_row(source.path, f"{share}, read {source.passes:.2f} times an epoch")
    return table


def _items(data: PreparedData) -> Any:
    """The items from the first on, which a person can compare with the file."""
    train: Any = data.train
    return train.one_pass() if isinstance(train, StreamedBlocks) else (train[i] for i in range(len(train)))
