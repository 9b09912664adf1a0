"""Data sets of the harness's tasks, read from local files in place of the Hub.

A task keeps its own definition; only its data set is replaced, by the data set's name, so every stock task on the same
data (gsm8k and gsm8k_cot, the variants of mmlu and bbh) can be run from the same files.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from graftlm.content import file_sha256
from graftlm.errors import UserError
from graftlm.evaluation import rows
from graftlm.training.data.readers import Row, read_file


class MissingData(UserError):
    """A task's questions or examples that are neither on the disk nor to be had from the Hub."""


@dataclass(frozen=True)
class LocalFormat:
    """Where one data set lies under the data folder, and how its rows become the stock data set's."""

    folders: tuple[str, ...]
    """Names its folder may have."""
    convert: rows.Convert
    split: str
    """The split that the stock task evaluates."""
    questions: str = "test.jsonl"
    """The file with that split."""
    examples: tuple[str, ...] = ("train.jsonl", "dev.jsonl")
    """Files that shots are taken from, the first that is there."""
    example_split: str = "train"
    """The split that the stock task takes shots from."""
    part: str | None = None
    """The column that names a row's subset, where one file holds all subsets."""
    only: tuple[str, ...] = ()
    """The tasks that the files are enough for (empty: every task on this data set)."""


FORMATS: dict[tuple[str, str | None], LocalFormat] = {
    ("allenai/ai2_arc", "ARC-Easy"): LocalFormat(("arc_easy",), rows.arc, "test"),
    ("allenai/ai2_arc", "ARC-Challenge"): LocalFormat(("arc_challenge",), rows.arc, "test"),
    ("allenai/openbookqa", "main"): LocalFormat(("openbookqa",), rows.openbookqa, "test"),
    ("baber/piqa", None): LocalFormat(("piqa",), rows.piqa, "validation"),
    # The stock task evaluates the public validation split: 1,954 questions, which such folders call dev.
    ("lighteval/siqa", None): LocalFormat(
        ("social_iqa", "socialiqa"), rows.social_iqa, "validation", questions="dev.jsonl", examples=("train.jsonl",)
    ),
    ("allenai/winogrande", "winogrande_xl"): LocalFormat(("winogrande",), rows.winogrande, "validation"),
    ("truthfulqa/truthful_qa", "multiple_choice"): LocalFormat(
        ("truthfulqa_mc1",), rows.truthfulqa_mc1, "validation", only=("truthfulqa_mc1",)
    ),
    ("tau/commonsense_qa", None): LocalFormat(("commonsense_qa", "commonsenseqa"), rows.commonsense_qa, "validation"),
    ("cais/mmlu", None): LocalFormat(
        ("mmlu",), rows.mmlu, "test", examples=("dev.jsonl",), example_split="dev", part="subject"
    ),
    ("openai/gsm8k", "main"): LocalFormat(("gsm8k",), rows.gsm8k, "test", examples=("train.jsonl",)),
    ("EleutherAI/lambada_openai", "default"): LocalFormat(("lambada_openai", "lambada"), rows.lambada, "test"),
    ("SaylorTwift/bbh", None): LocalFormat(("bbh",), rows.bbh, "test", part="task"),
    ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"): LocalFormat(
        ("wikitext", "wikitext2"), rows.wikitext, "test", questions="test.txt", examples=()
    ),
}
"""By the stock data set's path and name (None: any name, told apart by `part`)."""


@dataclass(frozen=True)
class LocalData:
    """What was read for one task."""

    splits: dict[str, Dataset]
    files: dict[str, str]
    """sha256 of each file that was read, by its path from the data folder."""
    notes: tuple[str, ...]
    """What keeps the numbers from being comparable with published ones."""


def find_format(task: str, config: Mapping[str, Any]) -> LocalFormat | None:
    """The local format of a stock task, by its YAML (`config`); None where only the Hub has its data."""
    path, name = str(config.get("dataset_path")), config.get("dataset_name")
    found = FORMATS.get((path, name))
    if found is None:
        whole = FORMATS.get((path, None))
        found = whole if whole is not None and whole.part is not None else None
    return found if found is not None and (not found.only or task in found.only) else None


def has_local(task: str, config: Mapping[str, Any], data_dir: str | Path) -> bool:
    """Whether `data_dir` has the questions of a stock task."""
    form = find_format(task, config)
    return form is not None and any((place / form.questions).is_file() for place in _places(form, data_dir))


def _places(form: LocalFormat, data_dir: str | Path) -> list[Path]:
    """Folders in which a data set may lie."""
    return [Path(data_dir, part, folder) for part in ("", "eval") for folder in form.folders]


def read_local(task: str, config: Mapping[str, Any], data_dir: str | Path, shots: int) -> LocalData:
    """The splits of a stock task from `data_dir`, with at least `shots` examples where the task needs any.

    Raises MissingData for a file that is missing (and where it was looked for) and for too few examples, UserError for
    a row with wrong fields (file:line) and a subset without rows.
    """
    form = find_format(task, config)
    assert form is not None
    places = _places(form, data_dir)
    found = [place for place in places if (place / form.questions).is_file()]
    if not found:
        looked = ", ".join(str(place / form.questions) for place in places)
        raise MissingData(f"{task}: no data: looked for {looked}; without --data-dir it is fetched from the Hub")
    questions = found[0] / form.questions
    examples = next((found[0] / name for name in form.examples if (found[0] / name).is_file()), None)
    used = [questions, *([examples] if examples is not None else [])]
    splits = {form.split: _select(questions, form, config, task)}
    pool = _select(examples, form, config, task) if examples is not None else []
    if len(pool) < shots:
        wanted = " or ".join(str(found[0] / name) for name in form.examples)
        raise MissingData(
            f"{task}: its shots need {shots} examples, {len(pool)} found; give {wanted}, or fewer shots ({task}:0)"
        )
    splits.setdefault(form.example_split, pool)
    files = {str(path.relative_to(data_dir)): file_sha256(path) for path in used}
    data = {name: Dataset.from_list(part) for name, part in splits.items()}
    return LocalData(data, files, tuple(_notes(form, splits[form.split])))


def read_splits(*, graftlm_task: str, graftlm_dir: str, graftlm_shots: int, dataset: dict[str, Any], **_: Any) -> Any:
    """`custom_dataset` of the YAML that stands in for a stock task: called by the harness in place of the Hub."""
    return read_local(graftlm_task, dataset, graftlm_dir, graftlm_shots).splits


def read_table(path: Path, convert: rows.Convert) -> list[dict[str, Any]]:
    """The rows of a jsonl (or parquet) file, converted; UserError for a file without rows."""
    table = [convert(row) for row in read_file(path, "text", table=True)]
    if not table:
        raise UserError(f"{path}: no rows")
    return table


def _select(path: Path, form: LocalFormat, config: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    if path.suffix == ".txt":
        return [form.convert(page) for page in _wiki_pages(path)]
    if form.part is None:
        return read_table(path, form.convert)
    parts = _parts(path, form, path.stat().st_mtime_ns)
    name = config.get("dataset_name")
    if name not in parts:
        raise UserError(f"{task}: {path}: no row with {form.part} {name!r}; there are {', '.join(sorted(parts))}")
    return parts[name]


@functools.lru_cache(maxsize=8)
def _parts(path: Path, form: LocalFormat, changed: int) -> dict[str, list[dict[str, Any]]]:
    """A file's rows by subset; kept, because dozens of tasks read the same file."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in read_file(path, "text", table=True):
        converted = form.convert(row)  # first, for it checks the fields
        parts.setdefault(row.fields[str(form.part)], []).append(converted)
    return parts


def _wiki_pages(path: Path) -> Iterator[Row]:
    """The articles of a WikiText file: each begins at a heading of the first level, ` = Title = `."""
    text = path.read_text(encoding="utf-8")
    starts = [match.start() for match in re.finditer(r"^ = [^=\n]+ = ?$", text, re.MULTILINE)]
    if not starts:
        raise UserError(f"{path}: no heading such as ` = Title = `; is this a WikiText file?")
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        yield Row({"page": text[start:end]}, str(path))


def _notes(form: LocalFormat, questions: list[dict[str, Any]]) -> Iterator[str]:
    if form.convert is rows.social_iqa and (without := sum(not row["context"] for row in questions)):
        yield f"{without} of {len(questions)} questions have no context: far harder than the published task"
    if form.convert is rows.wikitext and any("<unk>" in row["page"] for row in questions):
        yield "rare words are <unk>: not comparable with perplexities on raw WikiText"
