"""Operations of APEX's step over plain training's, counted by torch's FlopCounterMode: forward, backward and step.

    python benchmarks/flops.py [--model smollm2] [--tokens 2048 32768] [--length 512]

Every product is counted, the operators' included (their diagonal blocks D are computed, and so counted, as products).
Sequences do not attend to each other, so the model's count grows with their number, while APEX's part of a step does
not depend on it: one sequence is run, and the counts at other numbers of tokens follow exactly. Attention's own
products on a CPU are not known to FlopCounterMode; leaving them out makes the ratio larger, not smaller. The last line
is one JSON object.
"""

import argparse
import json
from typing import Any

from torch.utils.flop_counter import FlopCounterMode
from ways import add_options, batches, build_model, optimizer_of

from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.environment import describe_environment
from graftlm.files import write_json


def count(options: argparse.Namespace) -> tuple[int, int]:
    """Operations of one sequence's forward and backward pass, and of APEX's part of a step."""
    options.rows = 1
    model: Any = build_model(options)
    ids = batches(model, options)[0]
    apex = Apex(model, ApexConfig(stages=1))
    optimizer = optimizer_of(model)
    apex.start(optimizer, assess_on=[{"input_ids": ids}])
    with FlopCounterMode(display=False) as passes:
        model(input_ids=ids, labels=ids).loss.backward()
    with FlopCounterMode(display=False) as step:
        apex.pull_back()
        optimizer.step()
    apex.finish()
    model.zero_grad()
    with FlopCounterMode(display=False) as plain:
        model(input_ids=ids, labels=ids).loss.backward()
    # The assessment multiplies nothing by anything, so it must not show.
    assert plain.get_total_flops() == passes.get_total_flops()
    return plain.get_total_flops(), step.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 32768], help="tokens a step")
    options = parser.parse_args()
    sequence, step = count(options)
    ratios = {str(n): round(1 + step / (n // options.length * sequence), 6) for n in options.tokens}
    result = {
        "model": options.model,
        "length": options.length,
        "flops_per_sequence": sequence,
        "apex_flops_per_step": step,
        "apex_full_flops_ratio": ratios,
    }
    if options.out:
        write_json(options.out, {**result, "environment": describe_environment()})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
