"""Words of the command line that are numbers: argparse types that say what is wrong with one. Imports nothing heavy."""

import argparse
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def _number(kind: Callable[[str], Number], allowed: Callable[[Number], bool], rule: str) -> Callable[[str], Number]:
    name = "whole number" if kind is int else "number"

    def read(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {name}; it {rule}") from None
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{value} {rule}")
        return value

    return read


positive = _number(int, lambda value: value >= 1, "must be at least 1")
positive_number = _number(float, lambda value: value > 0, "must be above 0")
not_negative = _number(float, lambda value: value >= 0, "must not be negative")
share = _number(float, lambda value: 0 < value < 1, "must be between 0 and 1, e.g. 0.1")
