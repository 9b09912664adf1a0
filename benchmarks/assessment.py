"""What assessing every step costs, as a share of the step: the recorder's own time, and what sums add to the gate.

    python benchmarks/assessment.py [--model smollm2] [--rounds 5]

A whole step's time drifts by more than this on any shared machine, so the parts are timed where they happen: every
call of the recorder during real steps, and the gated product with and without its sums, in turn, on tensors of the
model's shape. The fused gate is compared with the model's own two operations as well, forward and backward: what it
saves there, assessment gets for nothing. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from turns import synchronize
from ways import Stopwatch, add_options, batches, build_model, device, optimizer_of

from graftlm.activations import ActivationRecorder
from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.environment import describe_environment
from graftlm.files import write_json
from graftlm.gate import gated_product
from graftlm.samples import find_samples

RECORDER = ("_begin", "_end", "_see")


def seconds_of(function: Any, *args: Any) -> float:
    synchronize()
    begin = time.perf_counter()
    function(*args)
    synchronize()
    return time.perf_counter() - begin


def gates(options: argparse.Namespace, apex: Apex, calls: int = 40) -> dict[str, float]:
    """Median seconds of all layers' gates: with sums, without, and as two plain operations; forward and backward."""
    block = next(apex.anatomy.of_kind("channels"))
    shape = (options.rows, options.length, block.components)
    activation = apex.model.get_submodule(block.probe)
    dtype = torch.bfloat16 if options.autocast else getattr(torch, options.dtype)
    gate, up = (torch.randn(shape, dtype=dtype, device=device(), requires_grad=True) for _ in range(2))
    grad = torch.randn(shape, dtype=dtype, device=device())
    samples = find_samples(shape[:2], None, None, gate.device)
    ways: dict[str, Any] = {
        "sums": lambda: gated_product(gate, up, "silu", samples)[0].backward(grad),
        "no_sums": lambda: gated_product(gate, up, "silu", None)[0].backward(grad),
        "plain": lambda: (activation.forward(gate) * up).backward(grad),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(calls + 2):
        for name, function in ways.items():
            seconds = seconds_of(function)
            if i >= 2:
                taken[name].append(seconds)
    layers = len(list(apex.anatomy.of_kind("channels")))
    return {name: layers * statistics.median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    model: Any = build_model(options)
    watch = Stopwatch()
    for name in RECORDER:  # before hooks keep a reference to them
        setattr(ActivationRecorder, name, watch.around(getattr(ActivationRecorder, name)))
    apex = Apex(model, ApexConfig(stages=1, assessment="random"))
    optimizer = optimizer_of(model)
    apex.start(optimizer)
    inputs = batches(model, options)

    def step(i: int) -> None:
        ids = inputs[i % len(inputs)]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=options.autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        apex.pull_back()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    steps, recorded = [], []
    for i in range(options.rounds + 1):
        watch.take()
        steps.append(seconds_of(step, i))
        recorded.append(watch.take())
    step_seconds = statistics.median(steps[1:])
    recorder_seconds = statistics.median(recorded[1:])
    gate = gates(options, apex)
    sums = gate["sums"] - gate["no_sums"]
    result = {
        "model": options.model,
        "tokens_per_step": options.rows * options.length,
        "step_seconds_median": round(step_seconds, 4),
        "recorder_seconds_median": round(recorder_seconds, 5),
        "gate_seconds": {name: round(seconds, 5) for name, seconds in gate.items()},
        "assessment_share": round((recorder_seconds + max(0.0, sums)) / step_seconds, 5),
        "fused_gate_share_of_step": round((gate["sums"] - gate["plain"]) / step_seconds, 5),
    }
    if options.out:
        write_json(options.out, {**result, "environment": describe_environment()})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
