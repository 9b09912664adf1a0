"""Shared against separate operators, on held-out loss: variants x seeds, same tokens, order and schedule in each seed.

    python experiments/operator_sharing/run.py [--seeds 3] [--work runs/operator_sharing]

Writes results.json beside this file: losses, paired differences, and their 95% interval (Student's t over seeds).
"""

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

from scipy.stats import t

from graftlm.environment import describe_environment
from graftlm.files import read_json, write_json

HERE = Path(__file__).parent
VARIANTS = {
    "plain": ["method=full"],
    "shared": ["method=apex", "apex.share_operators=true"],
    "separate": ["method=apex", "apex.share_operators=false"],
}


def run(variant: str, seed: int, work: Path) -> dict[str, float]:
    folder = work / f"{variant}-{seed}"
    if not (folder / "summary.json").exists():
        library = json.dumps(sysconfig.get_path("stdlib"))
        settings = [f"data.path={library}", f"eval_data.path={library}", f"seed={seed}"]
        command = [sys.executable, "-m", "graftlm", "train", str(HERE / "config.yaml"), f"output_dir={folder}"]
        subprocess.run([*command, "--resume", *settings, *VARIANTS[variant]], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, float] = read_json(folder / "summary.json")
    return found


def interval(differences: list[float]) -> dict[str, float]:
    mean, n = statistics.mean(differences), len(differences)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5 if n > 1 else float("inf")
    return {"mean": round(mean, 5), "low": round(mean - half, 5), "high": round(mean + half, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/operator_sharing"))
    options = parser.parse_args()
    losses: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    other: dict[str, dict[str, float]] = {}
    for seed in range(options.seeds):
        for variant in VARIANTS:
            summary = run(variant, seed, options.work)
            losses[variant].append(summary["eval_loss_end"])
            other[variant] = {k: summary[k] for k in ("operator_parameters", "tokens", "eval_loss_start")}
            print(f"seed {seed}  {variant:9} {summary['eval_loss_end']:.5f}", flush=True)
    pairs = [(v, "plain") for v in VARIANTS if v != "plain"] + [("separate", "shared")]
    differences = {f"{a} - {b}": interval([x - y for x, y in zip(losses[a], losses[b], strict=True)]) for a, b in pairs}
    result = {"eval_loss_end": losses, "differences": differences, "runs": other, "environment": describe_environment()}
    write_json(HERE / "results.json", result)
    print(json.dumps(differences, indent=2))


if __name__ == "__main__":
    main()
