"""Speed and memory on one GPU, every way of training on the same batches, in parts of at most ten minutes each.

    python benchmarks/gpu.py full --model 1.1b --rows 2      # APEX over plain training; MFU; assessment apart
    python benchmarks/gpu.py sweep --model 1.1b              # the same from 256 to 65,536 tokens a step
    python benchmarks/gpu.py autograd --model 1.1b           # expansion by autograd: the oracle, and concatenating
    python benchmarks/gpu.py small --model 8b --budget 0.024 # small regime over LoRA, DoRA and S2FT's way
    python benchmarks/gpu.py all                             # every part, one after the other

Weights are random where --model is a shape (135m, 1.1b, 3b, 8b): speed does not depend on them. By default sequences
are full (4096 tokens), weights are float32 with bfloat16 autocast (small: bfloat16 weights), and attention is sdpa.
Two ways at a time hold a model each and take steps in turn. The last line is one JSON object. Without a GPU it runs on
the CPU, to try a benchmark out on a few layers.
"""

import argparse
import json
from typing import Any

import torch
from small_regime import way_of_small
from turns import Record, step_ratio, take_turns
from ways import SHAPES, add_options, way

from graftlm.environment import describe_environment
from graftlm.files import write_json

# Dense bfloat16 operations per second, from the makers' data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
SWEEP = [256, 1024, 4096, 16384, 65536]


def flops_per_token(model: str, length: int, layers: int | None) -> float | None:
    """6 * (parameters in products) + 6 * layers * heads * (d_qk + d_v) * length; no recomputation, no lookup."""
    if model not in SHAPES:
        return None
    hidden, channels, all_layers, heads, groups, vocabulary = SHAPES[model]
    depth, head_dim = layers or all_layers, hidden // heads
    attention = hidden * head_dim * (2 * heads + 2 * groups)
    products = depth * (attention + 3 * hidden * channels) + vocabulary * hidden
    return 6 * products + 6 * depth * heads * 2 * head_dim * length


def describe(record: Record, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, tokens/s, MFU and memory of one way."""
    tokens = options.rows * options.length * options.accumulation
    seconds = record.median()
    found: dict[str, Any] = {
        "seconds": round(seconds, 5),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_bytes": record.peak_bytes,
        "reserved_bytes": int(record.steps[-1].get("reserved_bytes", 0)),
        **record.said,
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
    needed = flops_per_token(options.model, options.length, options.layers)
    if peak is not None and needed is not None:
        found["mfu"] = round(needed * tokens / seconds / peak, 4)
    return found


def full(options: argparse.Namespace) -> dict[str, Any]:
    """APEX against plain training, then with and without assessment."""
    records = take_turns(way, ["plain", "apex"], options, options.rounds)
    assessed = take_turns(way, ["apex", "unassessed"], options, options.rounds)
    one, other = records["apex"], records["plain"]
    return {
        "ways": {name: describe(record, options) for name, record in records.items()},
        **step_ratio("apex_full_step_ratio", one, other),
        "apex_full_memory_ratio": round(one.peak_bytes / other.peak_bytes, 4),
        **step_ratio("assessed_over_unassessed", assessed["apex"], assessed["unassessed"]),
    }


def trainer(options: argparse.Namespace) -> dict[str, Any]:
    """Our trainer against the bare loop, plain training."""
    records = take_turns(way, ["plain", "trainer"], options, options.rounds)
    return {
        "ways": {name: describe(record, options) for name, record in records.items()},
        **step_ratio("trainer_vs_bare_step_ratio", records["trainer"], records["plain"]),
    }


def autograd(options: argparse.Namespace) -> dict[str, Any]:
    """What expansion costs when autograd does it, over plain training."""
    result: dict[str, Any] = {"ways": {}}
    for name in ("concatenated", "oracle"):
        records = take_turns(way, ["plain", name], options, options.rounds)
        result["ways"][name] = describe(records[name], options)
        result |= step_ratio(f"{name}_step_ratio", records[name], records["plain"])
        result[f"{name}_memory_ratio"] = round(records[name].peak_bytes / records["plain"].peak_bytes, 4)
    return result


def sweep(options: argparse.Namespace) -> dict[str, Any]:
    """APEX over plain training by tokens a step: sequences of at most options.length, then more of them."""
    length, rows, by_tokens = options.length, options.rows, {}
    for tokens in SWEEP:
        options.length = min(length, tokens)
        options.rows = min(rows, tokens // options.length)
        options.accumulation = tokens // (options.length * options.rows)
        records = take_turns(way, ["plain", "apex"], options, options.rounds)
        by_tokens[str(tokens)] = step_ratio("apex_full_step_ratio", records["apex"], records["plain"])
    options.length, options.rows, options.accumulation = length, rows, 1
    return by_tokens


def small(options: argparse.Namespace) -> dict[str, Any]:
    """The small regime against LoRA at equal trainable parameters; then DoRA and S2FT's way."""
    result: dict[str, Any] = {"ways": {}}
    for name in ("apex", "dora", "s2ft"):
        records = take_turns(way_of_small, [name, "lora"], options, options.rounds)
        result["ways"] |= {other: describe(record, options) for other, record in records.items()}
        key = "apex_small" if name == "apex" else name
        result |= step_ratio(f"{key}_step_ratio_vs_lora", records[name], records["lora"])
        result[f"{key}_memory_ratio_vs_lora"] = round(records[name].peak_bytes / records["lora"].peak_bytes, 4)
    return result


PARTS = {"full": full, "trainer": trainer, "autograd": autograd, "sweep": sweep, "small": small}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    add_options(parser)
    parser.set_defaults(model=None, length=4096, rows=None, autocast=None, dtype=None)
    options = parser.parse_args()
    chosen, result = argparse.Namespace(**vars(options)), {}
    for part in PARTS if options.part == "all" else [options.part]:
        options = argparse.Namespace(**vars(chosen))
        in_small = part == "small"
        options.model = options.model or ("8b" if in_small else "1.1b")
        options.rows = options.rows or (1 if in_small else 2)
        options.dtype = options.dtype or ("bfloat16" if in_small else "float32")
        options.autocast = not in_small if options.autocast is None else options.autocast
        options.budget = options.budget or (0.024 if in_small else None)
        result[part] = {
            "model": options.model,
            "dtype": options.dtype,
            "autocast": options.autocast,
            "checkpointing": options.checkpointing,
            "rows": options.rows,
            "length": options.length,
            **PARTS[part](options),
        }
        print(json.dumps({part: result[part]}), flush=True)
        if chosen.out:
            write_json(chosen.out, {**result, "environment": describe_environment()})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
