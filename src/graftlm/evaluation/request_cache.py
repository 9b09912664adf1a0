"""Answers of a model, kept line by line while they come, so that a killed evaluation goes on where it was."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm_eval.api.model import hash_args

from graftlm.files import plain_disk_errors, write_text


class RequestCache:
    """A file of JSON lines: first what the answers depend on, then `[hash of the request, answer]`.

    Answers are held back until `flush`, which the harness's model calls between two passes: so what a killed
    evaluation left are whole batches, and the rest falls into the batches it would have fallen into.
    """

    def __init__(self, path: str | Path, key: dict[str, Any]) -> None:
        """Read `path`. What it holds is used if it was written with the same `key` (JSON values); else the first answer
        takes its place."""
        self.path = Path(path)
        self._answers: dict[str, list[Any]] = defaultdict(list)
        self._taken: Counter[str] = Counter()
        self._pending: list[str] = []
        self._first = "" if self._read(key) else json.dumps(key) + "\n"
        """Of a new file, which comes with the first answer: what is refused before leaves none."""

    def __len__(self) -> int:
        """Answers that were there when the file was opened."""
        return sum(map(len, self._answers.values()))

    def take(self, kind: str, arguments: Iterable[Any]) -> Any | None:
        """The answer kept for a request, or None.

        A sampled request (`do_sample`) that is asked n times gets n different answers, each only once.
        """
        arguments = tuple(arguments)
        name = hash_args(kind, arguments)
        answers = self._answers.get(name, [])
        number = self._taken[name]
        self._taken[name] += 1
        sampled = kind == "generate_until" and arguments[1].get("do_sample", False)
        if not sampled:
            number = min(number, len(answers) - 1)
        return answers[number] if 0 <= number < len(answers) else None

    def add(self, kind: str, arguments: Iterable[Any], answer: Any) -> None:
        """Keep an answer (JSON values), from the next `flush` on."""
        self._pending.append(json.dumps([hash_args(kind, arguments), answer]) + "\n")

    def flush(self) -> None:
        """Write what was added since the last time."""
        if self._pending and self._first:
            write_text(self.path, self._first)
            self._first = ""
        if self._pending:
            with plain_disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._pending))
            self._pending.clear()

    def remove(self) -> None:
        """Delete the file: the result that it was for is written."""
        self.path.unlink(missing_ok=True)

    def _read(self, key: dict[str, Any]) -> bool:
        """Take over the file's answers; a last line that was torn by a kill is cut off."""
        if not self.path.is_file():
            return False
        good = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    value = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    value = None
                if value is None:
                    break
                if good == 0:
                    if value != key:
                        return False
                else:
                    name, answer = value
                    self._answers[name].append(answer)
                good += len(line)
        if good == 0:
            return False
        with plain_disk_errors(self.path), self.path.open("r+b") as file:
            file.truncate(good)
        return True
