"""What a row means: a text, or a conversation as `messages`.

Known layouts: text; messages; prompt_completion (strings or message lists); alpaca (instruction, input, output);
sharegpt (conversations of from/value). Each becomes one of the two document classes here.
"""

import datetime
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from graftlm.errors import UserError
from graftlm.training.config import SourceConfig
from graftlm.training.data.messages import checked_messages, checked_tools, without_nones
from graftlm.training.data.readers import Columns, Row, check_characters, split_row
from graftlm.training.data.statistics import Counts

TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
"""What chat templates that write the day's date get for today, so that data do not depend on when they are prepared:
the day that those of Llama 3 fall back on."""
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
"""Columns a format needs, in the order in which `auto` tries them (before text, whose column is text_field)."""
OPTIONAL_COLUMNS = ("system", "input", "tools")
"""Columns that conversations may have beside these."""
CONVERSATIONS = 2
"""Raised when rows of conversations become other tokens, or others of them count, than before: old caches are then not
found. 2: content in parts, arguments as JSON, Nones of parquet, history in a prompt, white space before an answer."""


@dataclass(frozen=True)
class TextDocument:
    """A text, or one piece of a long one."""

    text: str
    index: int
    """Number of the document in its source, from 0."""
    first: bool
    last: bool
    where: str


@dataclass(frozen=True)
class Conversation:
    """Messages with `role` and `content` (a text); at least one from the assistant."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    """JSON schemas handed to the chat template."""
    index: int
    """Number of the document in its source, from 0."""
    where: str
    first_answer: int = 0
    """Number of the message from which the assistant's are learnt: those before are the prompt's history."""


def columns_of(format_name: str, source: SourceConfig) -> Columns:
    """What of a row is looked at."""
    if format_name == "text":
        return Columns((source.text_field,))
    return Columns(COLUMNS[format_name], OPTIONAL_COLUMNS)


def detect_format(row: Row, source: SourceConfig, *, prefer_text: bool = False) -> str:
    """The format of a source, from its setting or (auto) its first row's columns; a text column wins if prefer_text."""
    if source.format != "auto":
        return source.format
    candidates: dict[str, tuple[str, ...]] = {**COLUMNS, "text": (source.text_field,)}
    if prefer_text:
        candidates = {"text": (source.text_field,), **COLUMNS}
    for name, columns in candidates.items():
        if all(column in row.fields for column in columns):
            return name
    raise UserError(
        f"{row.where}: no known columns; found {_columns(row)}; needed: {source.text_field} (or "
        "data.text_field=COLUMN), messages, conversations, prompt and completion, or instruction and output; rename "
        "columns that hold them"
    )


def iterate_documents(
    rows: Iterator[Row], source: SourceConfig, format_name: str, counts: Counts | None = None
) -> Iterator[TextDocument] | Iterator[Conversation]:
    """Rows as documents. Texts of white space only are counted as empty and left out (they keep their number); long
    ones arrive in pieces (readers.PIECE_CHARACTERS)."""
    counts = counts if counts is not None else Counts()
    index, decided = -1, None
    needed = columns_of(format_name, source).needed
    if format_name == "text":
        rows = itertools.chain.from_iterable(split_row(row, source.text_field) for row in rows)
    for row in rows:
        index += row.first
        decided = decided or row.where
        _check_columns(row, needed, source, format_name, decided)
        if format_name == "text":
            text = row.fields[source.text_field]
            if not isinstance(text, str):
                raise UserError(
                    f"{row.where}: column {source.text_field} is {type(text).__name__}, not text; mend the row"
                )
            if row.first and row.last and not text.strip():
                counts.empty += 1
                continue
            check_characters(text, row.where)
            yield TextDocument(text, index, row.first, row.last, row.where)
        else:
            yield _conversation(row, source, format_name, index)


def _columns(row: Row) -> str:
    return ", ".join(map(str, row.fields)) or "none"


def _check_columns(row: Row, needed: tuple[str, ...], source: SourceConfig, format_name: str, decided: str) -> None:
    """decided: where the row is whose columns gave the format, if it is `auto`."""
    missing = [name for name in needed if name not in row.fields]
    if missing:
        option = "text_field or format" if missing[0] == source.text_field else "format"
        by = f" (format {format_name}, by {decided})" if source.format == "auto" and decided != row.where else ""
        raise UserError(
            f"{row.where}: no column {missing[0]}{by}; found {_columns(row)}; mend the row, or set {option}"
            + (", or a pattern for the files" if by else "")
        )


def _conversation(row: Row, source: SourceConfig, format_name: str, index: int) -> Conversation:
    needed, optional = columns_of(format_name, source)
    fields = {name: row.fields.get(name) for name in (*needed, *optional)}
    if row.padded:
        fields = {name: without_nones(value) for name, value in fields.items()}
    values = [fields[name] for name in needed]
    system = fields["system"] if format_name in ("alpaca", "sharegpt") else None
    history = 0
    messages: Any
    if format_name == "messages":
        messages = values[0]
    elif format_name == "sharegpt":
        messages = _from_sharegpt(values[0], row.where)
    elif format_name == "prompt_completion":
        prompt = _as_turns(values[0], "user", row.where)
        messages, history = prompt + _as_turns(values[1], "assistant", row.where), len(prompt)
    else:
        asked = {"instruction": values[0], "input": fields["input"]}
        for name, part in asked.items():
            if not isinstance(part, str | None):
                raise UserError(f"{row.where}: column {name} is {type(part).__name__}, not text; mend the row")
        question = "\n\n".join(part for part in asked.values() if part)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": values[1]}]
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    messages, tools = checked_messages(messages, row.where), checked_tools(fields["tools"], row.where)
    if all(message["role"] != "assistant" for message in messages[history:]):
        part = " in the completion" if history else ""
        raise UserError(f"{row.where}: no assistant message{part}, so nothing to learn; mend or remove the row")
    check_characters([messages, tools], row.where)
    return Conversation(messages, tools, index, row.where, history)


def _from_sharegpt(turns: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list):
        raise UserError(f"{where}: conversations is {type(turns).__name__}, not a list; mend the row")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if isinstance(turn, dict) and "role" in turn:
            messages.append(turn)
            continue
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise UserError(f"{where}: turn {number} needs the keys from and value; mend the row")
        if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
            raise UserError(
                f"{where}: turn {number}: unknown role {turn['from']!r}; known are {', '.join(SHAREGPT_ROLES)}"
            )
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return messages


def _as_turns(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return value
    raise UserError(f"{where}: prompt and completion must be text or lists of messages, not {type(value).__name__}")
