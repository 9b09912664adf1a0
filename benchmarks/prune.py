"""What pruning costs: seconds an iteration, memory, and how both grow with calibration tokens and parameters.

    python benchmarks/prune.py                              # SmolLM2, 20%, 50 iterations; 512 sequences; linearity
    python benchmarks/prune.py --short                      # the same with few iterations, to see that it works
    python benchmarks/prune.py --model 8b --dtype bfloat16 --parts whole    # on a GPU: a random model of that shape

Calibration is random tokens: times do not depend on which. Every figure is of a process of its own, and says how many
sequences of how many tokens an iteration sees. Operations of an iteration: 6 * tokens * (parameters of heads and
channels) + 4 * tokens * (those of the LM head, whose own gradient is not asked for) + 6 * tokens * layers * heads *
(d_qk + d_v) * length of a sequence, from the parameters left before it. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
from typing import Any

import torch
from turns import synchronize
from ways import SHAPES, build_model

from graftlm.anatomy import read_anatomy
from graftlm.environment import describe_environment, peak_memory_bytes
from graftlm.files import write_json
from graftlm.parts import component_cost, count_parameters
from graftlm.pruning.base import Batch
from graftlm.pruning.calibration import TOKENS_A_PASS
from graftlm.pruning.prune import prune
from graftlm.pruning.settings import PruneSettings

PARTS = ("whole", "authors_code", "tokens", "parameters")


def measure(options: argparse.Namespace, samples: int, iterations: int, counted: int) -> dict[str, Any]:
    """Prune once; `counted`: iterations after which the benchmark stops, the target being that of `iterations`."""
    torch.manual_seed(0)
    model = build_model(options).eval()
    anatomy = read_anatomy(model, smallest=1)
    components = sum(block.components * component_cost(model, block) for block in anatomy.blocks)
    total = count_parameters(model)
    head = model.get_output_embeddings().weight.numel()
    heads = sum(block.ranked * block.width for block in anatomy.of_kind("heads"))
    vocabulary, rows = model.config.vocab_size, max(1, TOKENS_A_PASS // options.length)

    def calibration(iteration: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(iteration)
        ids = torch.randint(vocabulary, (samples, options.length), generator=generator)
        return [{"input_ids": part, "labels": part} for part in ids.split(rows)]

    seconds: list[float] = []
    operations: list[float] = []
    left = components

    class Enough(Exception):
        pass

    def heard(step: Any) -> None:
        nonlocal left
        synchronize()
        tokens = samples * options.length
        operations.append(tokens * (6 * left + 4 * head + 6 * heads * 2 * options.length))
        left = components - (total - step.parameters)
        seconds.append(step.seconds)
        print(f"{step.iteration}: {step.seconds:.2f} s, {step.parameters:,} parameters", file=sys.stderr, flush=True)
        if len(seconds) == counted:
            raise Enough

    settings = PruneSettings(sparsity=options.sparsity, iterations=iterations, samples=samples)
    with contextlib.suppress(Enough):
        prune(model, settings, calibration, heard)
    return {
        "samples": samples,
        "sample_length": options.length,
        "parameters": total,
        "component_parameters": components,
        "iterations": len(seconds),
        "seconds": round(sum(seconds), 3),
        "seconds_per_iteration": round(statistics.median(seconds), 4),
        "flops_per_second": round(sum(operations) / sum(seconds)),
        "peak_bytes": peak_memory_bytes(),
    }


def apart(*arguments: Any) -> dict[str, Any]:
    """`measure` in a process of its own, so that its peak of memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: dict[str, Any] = pool.apply(measure, arguments)
    return found


def fit(xs: list[float], ys: list[float]) -> dict[str, float]:
    """Least squares of ys = intercept + slope * xs; r_squared is 1 where they lie on a line."""
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    slope, intercept = statistics.linear_regression(xs, ys)
    total = sum((y - mean_y) ** 2 for y in ys)
    missed = sum((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    return {
        "slope_times_mean_over_mean": round(slope * mean_x / mean_y, 4),  # 1: in proportion; 0: no growth
        "r_squared": round(1 - missed / total, 4) if total else 1.0,
    }


def compare(options: argparse.Namespace) -> dict[str, Any]:
    few = 2 if options.short else 4
    result: dict[str, Any] = {"model": options.model, "sparsity": options.sparsity, "dtype": options.dtype}
    if "whole" in options.parts:
        counted = few if options.short else options.iterations
        result["whole"] = apart(options, options.samples, options.iterations, counted)
    if "authors_code" in options.parts:
        result["authors_code"] = apart(options, 16 if options.short else 512, options.iterations, 1)
    if "tokens" in options.parts:
        sizes = [10, 20] if options.short else [10, 20, 40, 80]
        found = [apart(options, samples, options.iterations, few) for samples in sizes]
        seconds = [one["seconds_per_iteration"] for one in found]
        result["tokens"] = {"runs": found, **fit([one["samples"] * one["sample_length"] for one in found], seconds)}
    if "parameters" in options.parts:
        shape = options.model if options.model in SHAPES else "135m"
        layers = SHAPES[shape][2]
        depths = [layers // 3, layers] if options.short else [layers // 3, 2 * layers // 3, layers, 2 * layers]
        found = []
        for depth in depths:
            changed = argparse.Namespace(**{**vars(options), "model": shape, "layers": depth})
            found.append(apart(changed, options.samples, options.iterations, few))
        seconds = [one["seconds_per_iteration"] for one in found]
        result["parameters"] = {"runs": found, **fit([one["parameters"] for one in found], seconds)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help=f"what load_model takes, or a shape: {', '.join(SHAPES)}")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--samples", type=int, default=10, help="calibration sequences an iteration")
    parser.add_argument("--length", type=int, default=64, help="tokens a calibration sequence")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, to try it out")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--short", action="store_true", help="few iterations and sizes")
    parser.add_argument("--out", help="write the result to this JSON file too")
    parser.set_defaults(checkpointing=False)
    options = parser.parse_args()
    result = compare(options)
    if options.out:
        write_json(options.out, {**result, "environment": describe_environment()})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
