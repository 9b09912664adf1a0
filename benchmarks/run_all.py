"""Every benchmark that a CPU can run, one after the other; `make bench`. About 20 minutes on two cores.

    python benchmarks/run_all.py [--out benchmarks/results/cpu.json] [--only NAME ...]

The last line is one JSON object with the figures of all.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from graftlm.environment import describe_environment
from graftlm.files import write_json

HERE = Path(__file__).parent
BENCHMARKS = {
    "flops": [],
    "step_cost": ["--rounds", "7"],
    "assessment": ["--rounds", "3"],
    "small_regime": ["--rounds", "7"],
    "fsdp2": [],
}


def run(name: str, arguments: list[str]) -> dict[str, Any]:
    """One benchmark's last line."""
    print(f"-- {name}", file=sys.stderr, flush=True)
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"benchmarks/{name}.py failed (exit {done.returncode}); its error is above")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def headline(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that the performance page is about, of the benchmarks that ran."""
    keys = (
        "apex_span_share",
        "apex_full_step_ratio",
        "apex_full_step_ratio_interval",
        "apex_full_memory_ratio",
        "apex_full_flops_ratio",
        "assessment_share",
        "trainer_vs_bare_step_ratio",
        "trainer_vs_bare_step_ratio_interval",
        "fsdp2_relative_difference",
        "fsdp2_added_bytes_share",
    )
    result = {key: values[key] for key in keys for values in found.values() if key in values}
    for budget, values in found.get("small_regime", {}).get("budgets", {}).items():
        for key in ("step_ratio_vs_lora", "step_ratio_vs_lora_interval", "memory_ratio_vs_lora"):
            result.setdefault(f"apex_small_{key}", {})[budget] = values[f"apex_small_{key}"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write all results to this JSON file too")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for name in options.only:
        found[name] = run(name, BENCHMARKS[name])
        if options.out:
            write_json(options.out, {**headline(found), "details": found, "environment": describe_environment()})
    print(json.dumps(headline(found)))


if __name__ == "__main__":
    main()
