"""What finished runs took, which tells how long others will take."""

import statistics
from collections.abc import Callable, Iterable

from graftlm.comparing.results import Record
from graftlm.environment import describe_environment, hardware


class Taken:
    """Seconds that finished runs on the hardware of this machine took, by method."""

    def __init__(self, records: Iterable[Record], seconds: Callable[[Record], float | None]):
        """seconds: what a record adds, e.g. of one step; None where it tells nothing."""
        here = hardware(describe_environment())
        self._by_method: dict[str, list[float]] = {}
        for record in records:
            if (took := seconds(record)) is not None and hardware(record["environment"]) == here:
                self._by_method.setdefault(record["method"], []).append(took)

    def median(self, method: str, *, besides: str | None = None) -> float | None:
        """Of that method's runs, else of all but those of the method `besides`; None if nothing is known."""
        known = self._by_method.get(method) or [
            took for name, all_of_it in self._by_method.items() if name != besides for took in all_of_it
        ]
        return statistics.median(known) if known else None
