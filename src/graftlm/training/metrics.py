"""What a run writes and shows while it goes: metrics.jsonl, one JSON object a line, and a progress bar."""

import json
import math
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from graftlm.files import plain_disk_errors
from graftlm.progress import step_bar


class MetricsLog:
    """Appends to metrics.jsonl; with `write` off (in all but one process of a run) leaves it alone."""

    def __init__(self, path: Path, *, write: bool = True):
        self.path = path
        self._write = write

    @property
    def size(self) -> int:
        """Bytes written so far, all of them on disk: what a checkpoint keeps for `rewind`."""
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, size: int) -> None:
        """Cut off what was written after the first `size` bytes: a run goes on from there, and will write it again."""
        if not self._write:
            return
        with plain_disk_errors(self.path), self.path.open("ab") as file:
            file.truncate(min(size, self.size))

    def write(self, **values: Any) -> None:
        """Append one line. Numbers that JSON has no word for (NaN) become null."""
        if not self._write:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with plain_disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Display:
    """A bar with loss, tokens/s and time left on a terminal; elsewhere a line each time metrics are logged."""

    def __init__(self, title: str, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.title = title
        self._progress = step_bar(self.console)
        self._task = self._progress.add_task(title, total=None, figures="")

    def start(self, step: int, total: int) -> None:
        self._progress.update(self._task, total=total, completed=step)
        self._progress.start()

    def step(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def figures(self, step: int, total: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        shown = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, figures=shown)
        if not self.console.is_terminal:
            left = f"{seconds_left / 60:.1f} min left"
            self.console.print(f"{self.title}  step {step}/{total}  {shown}  {left}", highlight=False)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False)

    def stop(self) -> None:
        self._progress.stop()
