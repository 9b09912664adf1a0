"""What APEX adds to a training step in the full regime, and what our trainer adds to a bare PyTorch loop.

    python benchmarks/step_cost.py [--model smollm2] [--rounds 7] [--out FILE.json]

Ratios are of neighbouring steps taken in turn; medians and 95% bootstrap intervals are printed, and the last line is
one JSON object. `apex_span_share` is the time inside pull back, swap in and write back, over its step's.
"""

import argparse
import json
import statistics
from typing import Any

from turns import step_ratio, take_turns
from ways import add_options, way

from graftlm.environment import describe_environment
from graftlm.files import write_json


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Plain training against APEX, then against our trainer: two processes at a time, for memory's sake."""
    options.spans = True
    records = take_turns(way, ["plain", "apex"], options, options.rounds)
    trainers = take_turns(way, ["plain", "trainer"], options, options.rounds)
    one, other = records["apex"], records["plain"]
    spans = [step["span_seconds"] / step["seconds"] for step in one.steps]
    return {
        "model": options.model,
        "tokens_per_step": options.rows * options.length * options.accumulation,
        "rounds": options.rounds,
        "plain_seconds_median": round(other.median(), 4),
        "apex_seconds_median": round(one.median(), 4),
        "plain_peak_bytes": other.peak_bytes,
        "apex_peak_bytes": one.peak_bytes,
        "apex_span_share": round(statistics.median(spans), 5),
        **step_ratio("apex_full_step_ratio", one, other),
        "apex_full_memory_ratio": round(one.peak_bytes / other.peak_bytes, 4),
        **step_ratio("trainer_vs_bare_step_ratio", trainers["trainer"], trainers["plain"]),
        "trainer_vs_bare_memory_ratio": round(trainers["trainer"].peak_bytes / trainers["plain"].peak_bytes, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    result = compare(options)
    if options.out:
        write_json(options.out, {**result, "environment": describe_environment()})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
