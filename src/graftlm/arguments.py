"""Words of the command line: argparse types that say what is wrong with a number; configs and settings. Imports nothing
heavy."""

import argparse
import itertools
import re
import textwrap
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, TypeVar

Number = TypeVar("Number", int, float)
Count = Annotated[int, "count"]
"""Of a config's field: a whole number that may be written 100M or 1.5B (parameter_count)."""


class HelpFormatter(argparse.HelpFormatter):
    """Help as wide as the terminal: paragraphs are filled, indented lines (examples) stay as they are; usage shows the
    words of `settings` as their metavar writes them."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = []
        for raw, some in itertools.groupby(text.splitlines(), lambda line: not line.strip() or line.startswith(" ")):
            lines = list(some)
            filled += lines if raw else textwrap.wrap(" ".join(lines), width, break_on_hyphens=False)
        return "".join(f"{indent}{line}\n" for line in filled)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.dest == "settings":
            return str(action.metavar)
        return super()._format_args(action, default_metavar)


def _number(kind: Callable[[str], Number], allowed: Callable[[Number], bool], rule: str) -> Callable[[str], Number]:
    name = "whole number" if kind is int else "number"

    def read(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            hint = percent(text) if kind is float else ""
            raise argparse.ArgumentTypeError(f"{text!r} is no {name}; it {hint or rule}") from None
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{value} {rule}")
        return value

    return read


def percent(text: str) -> str:
    """What to say of a number that is written as a percentage; empty for others."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", text.strip())
    return f"is written {float(found[1]) / 100:g}" if found else ""


positive = _number(int, lambda value: value >= 1, "must be at least 1")
positive_number = _number(float, lambda value: value > 0, "must be above 0")
whole = _number(int, lambda value: value >= 0, "must not be negative")
not_negative = _number(float, lambda value: value >= 0, "must not be negative")
share = _number(float, lambda value: 0 < value < 1, "must be between 0 and 1, e.g. 0.1")


def parameter_count(text: str) -> int:
    """A number of parameters as people write it: 134515008, 100M, 1.5B, 134_515_008. ValueError for anything else."""
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([kKmMbBgG]?)", text.strip())
    exponent = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9}
    if found:
        exact = Decimal(found[1].replace("_", "").replace(",", "")) * 10 ** exponent[found[2].lower()]
        if exact == int(exact):
            return int(exact)
    raise ValueError(f"{text!r} is no number of parameters; write it as 100M, 1.5B or 134515008")


def parameters(text: str) -> int:
    """parameter_count as an argparse type."""
    try:
        return parameter_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that name a config file, and those that are KEY=VALUE."""
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    return files, [word for word in words if word not in files]
