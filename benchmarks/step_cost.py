"""What APEX adds to a training step: time and peak memory against plain training of the same model.

    python benchmarks/step_cost.py [--model smollm2] [--rounds 7] [--out FILE.json]

Each variant lives in a process of its own, so each has its own peak of memory; they take steps in turn, so that a
machine whose speed drifts slows both. The ratio is of neighbouring steps; its median and a bootstrap interval are
printed, and the last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.environment import describe_environment, peak_memory_bytes
from graftlm.files import write_json
from graftlm.models import load_model

VARIANTS = ("plain", "apex")


def worker(variant: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Hold a model; take one optimizer step each time the parent asks, and say how long it took."""
    torch.manual_seed(0)
    model = load_model(options.model).train()
    model.config.use_cache = False
    vocabulary = model.config.vocab_size
    batches = [torch.randint(vocabulary, (options.rows, options.length)) for _ in range(4)]
    spans = 0.0

    def timed(function: Any) -> Any:
        def wrapper(*args: Any) -> None:
            nonlocal spans
            begin = time.perf_counter()
            function(*args)
            spans += time.perf_counter() - begin

        return wrapper

    apex = None
    if variant == "apex":
        apex = Apex(model, ApexConfig(stages=1))
        # Time inside what APEX does to a step, the assessment's hooks not included.
        apex._before_step, apex._after_step = timed(apex._before_step), timed(apex._after_step)  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)
    pull_back = None
    if apex is not None:
        apex.start(optimizer, assess_on=[{"input_ids": batches[0]}])
        pull_back = timed(apex.pull_back)
    pipe.send("ready")
    for step in iter(pipe.recv, None):
        spans = 0.0
        begin = time.perf_counter()
        ids = batches[step % len(batches)]
        model(input_ids=ids, labels=ids).loss.backward()
        if pull_back is not None:
            pull_back()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pipe.send((time.perf_counter() - begin, spans, peak_memory_bytes()))


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--rounds", type=int, default=7, help="counted steps of each variant, after one that is not")
    parser.add_argument("--out", help="write the result to this JSON file too")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for variant in VARIANTS:  # one after the other, or loading two models at once would disturb both
        pipes[variant], child = context.Pipe()
        processes.append(context.Process(target=worker, args=(variant, options, child), daemon=True))
        processes[-1].start()
        pipes[variant].recv()
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    spans: list[float] = []
    peaks: dict[str, int] = {}
    for step in range(options.rounds + 1):
        order = VARIANTS if step % 2 else VARIANTS[::-1]  # neither always goes first
        for variant in order:
            pipes[variant].send(step)
            took, inside, peaks[variant] = pipes[variant].recv()
            if step > 0:
                seconds[variant].append(took)
                if variant == "apex":
                    spans.append(inside / took)
        if step > 0:
            print("  ".join(f"{v} {seconds[v][-1]:.2f} s" for v in VARIANTS), file=sys.stderr, flush=True)
    for variant in VARIANTS:
        pipes[variant].send(None)
    ratios = [a / p for a, p in zip(seconds["apex"], seconds["plain"], strict=True)]
    low, high = interval(ratios)
    result = {
        "model": options.model,
        "tokens_per_step": options.rows * options.length,
        "rounds": options.rounds,
        "plain_seconds_median": round(statistics.median(seconds["plain"]), 3),
        "apex_seconds_median": round(statistics.median(seconds["apex"]), 3),
        "plain_peak_bytes": peaks["plain"],
        "apex_peak_bytes": peaks["apex"],
        "apex_span_share": round(statistics.median(spans), 5),
        "apex_full_step_ratio": round(statistics.median(ratios), 4),
        "apex_full_step_ratio_interval": [round(low, 4), round(high, 4)],
        "apex_full_memory_ratio": round(peaks["apex"] / peaks["plain"], 4),
    }
    if options.out:
        write_json(options.out, {**result, "environment": describe_environment()})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
