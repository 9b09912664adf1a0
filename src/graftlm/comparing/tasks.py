"""The tasks that a comparison evaluates its models on, by `graftlm eval`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from graftlm.errors import UserError


class TaskSettings(Protocol):
    """The keys of a comparison's config that are about tasks."""

    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def task_limit(self) -> int | None: ...
    @property
    def task_data_dir(self) -> str | None: ...
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
    allow_code_execution: bool = False
    """HumanEval may run programs that the models wrote."""
    trust_remote_code: bool = False
    """Code that comes with the model may run."""

    @classmethod
    def of(cls, settings: TaskSettings) -> "Tasks":
        return cls(settings.tasks, settings.task_limit, settings.task_data_dir, settings.allow_code_execution)

    def options(self) -> list[str]:
        """Words of its command line."""
        words = ["--tasks", ",".join(self.asked)] if self.asked else []
        words += ["--limit", str(self.limit)] if self.limit is not None else []
        words += ["--data-dir", self.data_dir] if self.data_dir is not None else []
        words += ["--trust-remote-code"] * self.trust_remote_code
        return words + ["--allow-code-execution"] * self.allow_code_execution

    def check(self) -> None:
        """Raise UserError for tasks that are unknown, without data or not allowed: before the first run, not after."""
        from graftlm.evaluation.humaneval import check_humaneval  # here: the harness takes seconds
        from graftlm.evaluation.task_lists import HUMANEVAL
        from graftlm.evaluation.tasks import parse_tasks, prepare_tasks

        asked = parse_tasks(list(self.asked))
        if any(one.name == HUMANEVAL for one in asked):
            check_humaneval(self.allow_code_execution)
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise UserError(f"task_data_dir: {self.data_dir}: no such folder")
        if others := [one for one in asked if one.name != HUMANEVAL]:
            prepare_tasks(others, data_dir=self.data_dir, limit=self.limit)
