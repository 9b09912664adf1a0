"""Sigma of activations before training, after plain training and after APEX: figures 6 to 9, and a table.

python experiments/fig6/summarise.py runs/fig6/assessed experiments/fig6

ASSESSED has a folder for each run of the comparison, with what `graftlm assess` found of it beside the start.
"""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from graftlm.comparing.statistics import difference
from graftlm.files import read_json, write_json
from graftlm.reporting.distributions import plot_sigma, relative_sigma, sigma

KINDS = ("heads", "channels")
MEASURES = {"sigma": sigma, "sigma_over_mean": relative_sigma}


def activations_of(told: dict[str, Any]) -> dict[str, dict[int, np.ndarray]]:
    """{kind: {layer: mean activations [units]}} of one assessed model."""
    found: dict[str, dict[int, np.ndarray]] = {kind: {} for kind in KINDS}
    for block in told["layers"].values():
        found[block["kind"]][block["layer"]] = np.array(block["average"])
    return found


def main() -> None:
    assessed, out = Path(sys.argv[1]), Path(sys.argv[2])
    seen: dict[str, dict[int, Any]] = {"control": {}, "apex": {}}
    for folder in sorted(assessed.iterdir()):
        arm, seed = re.match(r"(control|apex)-seed(\d+)", folder.name).groups()
        found = read_json(folder / "assessment.json")
        before, after = map(activations_of, found["models"])
        seen[arm][int(seed)] = after
    seeds = sorted(seen["apex"])
    plot_sigma(
        {"before": before, "control": seen["control"][seeds[0]], "apex": seen["apex"][seeds[0]]}, out / "sigma.png"
    )
    told: dict[str, Any] = {key: found[key] for key in ("data", "sample", "max_length", "environment")} | {
        "seeds": seeds
    }
    for kind in KINDS:
        for name, measure in MEASURES.items():

            def mean(model: dict[str, dict[int, np.ndarray]]) -> float:
                return float(np.mean([measure(values) for values in model[kind].values()]))  # noqa: B023

            after = {arm: [mean(runs[seed]) for seed in seeds] for arm, runs in seen.items()}
            told[f"{kind} {name}"] = {
                "before": mean(before),
                **after,
                "control minus before": interval(np.array(after["control"]) - mean(before)),
                "apex minus before": interval(np.array(after["apex"]) - mean(before)),
                "apex minus control": interval(np.array(after["apex"]) - np.array(after["control"])),
            }
            print(kind, name, told[f"{kind} {name}"])
    write_json(out / "results.json", told)


def interval(differences: np.ndarray) -> dict[str, Any]:
    found = difference(differences.tolist())
    return {"mean": found.mean, "t_interval": found.t_interval}


if __name__ == "__main__":
    main()
