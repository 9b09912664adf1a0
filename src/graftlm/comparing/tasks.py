"""The tasks that a comparison evaluates its models on, by `graftlm eval`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from graftlm.content import file_sha256
from graftlm.errors import UserError
from graftlm.evaluation.task_lists import CODE_SAMPLES, HUMANEVAL, LISTS

FLOAT32 = "float32"
"""What `graftlm eval` holds weights in unless it is told otherwise."""


class TaskSettings(Protocol):
    """The keys of a comparison's config that are about tasks."""

    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def task_limit(self) -> int | None: ...
    @property
    def task_data_dir(self) -> str | None: ...
    @property
    def task_batch_size(self) -> int: ...
    @property
    def allow_code_execution(self) -> bool: ...


@dataclass(frozen=True)
class Tasks:
    """What is asked of `graftlm eval`."""

    asked: tuple[str, ...] = ()
    """Names as they were given, lists of papers among them."""
    limit: int | None = None
    """Questions a task; None: all."""
    data_dir: str | None = None
    """Folder with the tasks' data; None: from the Hub."""
    batch_size: int = 1
    """Sequences a pass."""
    allow_code_execution: bool = False
    """HumanEval may run programs that the models wrote."""
    dtype: str = FLOAT32
    """What the weights are held in."""
    trust_remote_code: bool = False
    """Code that comes with the model may run."""

    @classmethod
    def of(cls, settings: TaskSettings) -> "Tasks":
        return cls(
            settings.tasks,
            settings.task_limit,
            settings.task_data_dir,
            settings.task_batch_size,
            settings.allow_code_execution,
        )

    def options(self) -> list[str]:
        """Words of its command line."""
        words = ["--tasks", ",".join(self.asked)] if self.asked else []
        words += ["--limit", str(self.limit)] if self.limit is not None else []
        words += ["--data-dir", self.data_dir] if self.data_dir is not None else []
        words += ["--batch-size", str(self.batch_size)] if self.batch_size != 1 else []
        words += ["--dtype", self.dtype] if self.dtype != FLOAT32 else []
        words += ["--trust-remote-code"] * self.trust_remote_code
        return words + ["--allow-code-execution"] * self.allow_code_execution

    def answered(self, kept: Mapping[str, Any]) -> bool:
        """Whether a run's kept scores (Record's `tasks`) are of these tasks and shots, as many questions of each, and
        the files that stand in the data folder now. What is not there to compare, such as a data set of the Hub, is
        taken for the same."""
        results, wanted = kept.get("results", {}), _words(self.asked)
        missing = [
            word
            for word in wanted - _words(kept.get("asked") or ())
            if word.shots is None or results.get(word.name, {}).get("shots") != word.shots
        ]
        if missing or not same_measure(kept, {"limit": self.limit, "dtype": self.dtype}):
            return False
        names = {word.name for word in wanted}
        # A name that is no result of its own is of a group's task.
        used = [(name, told) for name, told in kept.get("data", {}).items() if name in names or name not in results]
        return self.data_dir is None or all(_same_questions(name, told, Path(self.data_dir)) for name, told in used)

    def check(self) -> None:
        """Raise UserError for tasks that are unknown, without data or not allowed: before the first run, not after."""
        from graftlm.evaluation.humaneval import check_humaneval  # here: the harness takes seconds
        from graftlm.evaluation.tasks import parse_tasks, prepare_tasks

        asked = parse_tasks(list(self.asked))
        if any(one.name == HUMANEVAL for one in asked):
            check_humaneval(self.allow_code_execution)
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise UserError(f"task_data_dir: {self.data_dir}: no such folder")
        if others := [one for one in asked if one.name != HUMANEVAL]:
            prepare_tasks(others, data_dir=self.data_dir, limit=self.limit)


def same_measure(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two records' `tasks` are of as many questions, asked of weights in the same numbers."""
    measure = {"limit": None, "dtype": FLOAT32}  # records from before there were other dtypes do not tell theirs
    return all(some.get(key, default) == others.get(key, default) for key, default in measure.items())


class _Word(NamedTuple):
    name: str
    shots: int | None
    """None: the harness's own number."""
    samples: int
    """Programs a problem, where it writes any."""


def _words(asked: Iterable[str]) -> set[_Word]:
    """The tasks that names, lists of papers among them, stand for."""
    asked = list(asked)
    samples = max((CODE_SAMPLES.get(name, 1) for name in asked), default=1)
    words = [word.partition(":") for name in asked for word in LISTS.get(name, [name])]
    return {
        _Word(name, int(shots) if shots.isdecimal() else None, samples if name == HUMANEVAL else 1)
        for name, _, shots in words
    }


def _same_questions(task: str, told: Mapping[str, Any], folder: Path) -> bool:
    """Whether nothing in `folder` says otherwise than `told`: the hashes of the files that were read, or the Hub."""
    if "hub" in told:
        from graftlm.evaluation.local_data import has_local  # here: it takes seconds

        return not has_local(task, {"dataset_path": told["hub"], "dataset_name": told["name"]}, folder)
    there = [(folder / name, digest) for name, digest in told.items() if (folder / name).is_file()]
    return all(file_sha256(path) == digest for path, digest in there)
