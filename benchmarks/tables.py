"""The table of docs/performance.md from benchmarks/results/cpu.json.

python benchmarks/tables.py [benchmarks/results/cpu.json]
"""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "cpu.json"

# Key (of a budget, where there are several), what it is, and what it should reach.
ROWS = [
    ("apex_span_share", None, "full regime: time inside APEX's spans over step time", "<= 0.01"),
    ("apex_full_step_ratio", None, "full regime / plain, step time", ""),
    ("fused_gate_share_of_step", None, "APEX's gate with its sums, over the plain product, of a step", ""),
    ("apex_full_memory_ratio", None, "full regime / plain, peak memory", "<= 1.03"),
    ("apex_full_flops_ratio", "2048", "operations, full regime / plain, 2,048 tokens a step", "<= 1.003"),
    ("apex_full_flops_ratio", "32768", "operations, full regime / plain, 32,768 tokens a step", "<= 1.0005"),
    ("assessment_share", None, "assessment at every step, of a step", "<= 0.01"),
    ("apex_small_step_ratio_vs_lora", "0.024", "small regime / LoRA, step time, 2.4% trainable", "<= 1.00"),
    ("apex_small_memory_ratio_vs_lora", "0.024", "small regime / LoRA, peak memory, 2.4% trainable", "<= 1.00"),
    ("apex_small_step_ratio_vs_lora", "0.145", "small regime / LoRA, step time, 14.5% trainable", "<= 0.90"),
    ("apex_small_memory_ratio_vs_lora", "0.145", "small regime / LoRA, peak memory, 14.5% trainable", "<= 0.90"),
    ("trainer_vs_bare_step_ratio", None, "our trainer / bare PyTorch loop, plain training", "<= 1.02"),
    ("fsdp2_relative_difference", None, "FSDP2 on 4 processes against one, weights after 20 steps", "<= 1e-5"),
    ("fsdp2_added_bytes_share", None, "bytes that APEX adds to a step's communication", "<= 0.0025"),
]


def table(results: dict[str, Any]) -> str:
    """Markdown; an interval where there is one."""
    lines = ["| figure | measured | 95% interval | aim |", "|---|---|---|---|"]
    for key, part, what, aim in ROWS:
        # The share of the gate is among the details of the assessment.
        value = results.get(key, results.get("details", {}).get("assessment", {}).get(key))
        interval = results.get(f"{key}_interval")
        if part is not None:
            value, interval = (value or {}).get(part), (interval or {}).get(part)
        if value is None:
            continue
        between = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
        shown = f"{value:.5g}" if value > 1e-4 else f"{value:.2g}"
        lines.append(f"| {what} | {shown} | {between} | {aim} |")
    return "\n".join(lines)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    print(table(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
