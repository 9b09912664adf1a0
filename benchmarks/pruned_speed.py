"""What pruning buys: speed and memory of a pruned model against the original, in transformers and in llama.cpp.

    python benchmarks/pruned_speed.py [--model smollm2] [--share 0.4] [--uniform] [--pruned DIR] [--rounds 5]

Each model runs in a process of its own and they take turns (benchmarks/turns.py), so that a machine whose speed drifts
slows all alike. Without --pruned, random components go: speed does not ask which. A ratio below 1 is faster or smaller;
beside it stands the share of FLOPs and of parameters that is left, which it should come close to. llama.cpp (PyPI's
xllamacpp) needs `pip install 'graftlm[export]'`; without it only transformers is measured. The last line is one JSON
object.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from turns import Record, Turn, interval, take_turns

from graftlm.anatomy import decoder_linears, linear
from graftlm.environment import describe_environment, peak_memory_bytes
from graftlm.export import llama_cpp
from graftlm.files import write_json
from graftlm.models import load_model, load_tokenizer

RUNTIMES = ("transformers", "llama.cpp")
MODELS = ("original", "pruned")


def randomly_pruned(model: Any, share: float, uniform: bool, multiple: int) -> Any:
    """`model` without about `share` of its channels and key-value groups, chosen at random: as many in every layer, or
    from half to one and a half times the share. Every layer keeps a group and `multiple` channels, and its channels are
    a multiple of that."""
    from graftlm.pruning.surgery import keep_components, prunable_blocks

    generator = torch.Generator().manual_seed(0)
    kept = {}
    for block in prunable_blocks(model):
        own = share if uniform else share * (0.5 + float(torch.rand(1, generator=generator)))
        step = multiple if block.kind == "channels" else 1
        count = max(1, round(block.components * (1 - own) / step)) * step
        kept[block.name] = torch.randperm(block.components, generator=generator)[: min(count, block.components)]
    return keep_components(model, kept)


def sizes(model: Any) -> dict[str, int]:
    """Parameters and FLOPs of a token: 2 for each weight of the decoder's and the output's matrices. The embedding's
    rows are looked up, not multiplied; attention's scores are left out (they grow with the text)."""
    decoder = sum(linear(model, name).weight.numel() for name in decoder_linears(model))
    output = model.get_output_embeddings().weight.numel()
    return {
        "parameters": model.num_parameters(),
        "decoder_parameters": decoder,
        "decoder_flops_per_token": 2 * decoder,
        "flops_per_token": 2 * (decoder + output),
    }


def way(name: str, options: argparse.Namespace, turn: Turn) -> None:
    """One model in one runtime: a step reads a prompt and writes tokens."""
    runtime, which = name.split(":")
    before = peak_memory_bytes()
    if runtime == "transformers":
        model = load_model(str(options.folder / which)).eval()
        said: dict[str, Any] = sizes(model)
        take: Any = lambda ids: transformers_step(model, ids, options.tokens)  # noqa: E731
    else:
        server = llama_cpp.open_server(
            str(options.folder / f"{which}.gguf"),
            context=options.prompt + options.tokens + 8,
            threads=options.threads,
            exact=False,
        )
        said = {}
        take = lambda ids: llama_cpp_step(server, ids, options.tokens)  # noqa: E731
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    turn.ready(before=before, **said)
    for _ in turn.steps():
        ids = torch.randint(3, options.vocabulary, (options.prompt,), generator=generator)
        turn.noted = take(ids)


@torch.inference_mode()
def transformers_step(model: Any, ids: torch.Tensor, tokens: int) -> dict[str, float]:
    from time import perf_counter

    begin = perf_counter()
    out = model(ids[None], use_cache=True, logits_to_keep=1)
    read = perf_counter()
    for _ in range(tokens):
        best = out.logits[:, -1:].argmax(-1)
        out = model(best, past_key_values=out.past_key_values, use_cache=True)
    return {"prompt_seconds": read - begin, "token_seconds": (perf_counter() - read) / tokens}


def llama_cpp_step(server: Any, ids: torch.Tensor, tokens: int) -> dict[str, float]:
    given = {"prompt": ids.tolist(), "n_predict": tokens, "temperature": 0.0, "ignore_eos": True}
    timings = server.handle_completions({**given, "cache_prompt": False})["timings"]
    if timings["predicted_n"] < tokens:
        raise RuntimeError(f"llama.cpp wrote {timings['predicted_n']} tokens, {tokens} were asked for")
    # Of n tokens the first comes with the prompt.
    written = 1e-3 * timings["predicted_ms"] / max(1, tokens - 1)
    return {"prompt_seconds": 1e-3 * timings["prompt_ms"], "token_seconds": written}


def prepare(options: argparse.Namespace) -> None:
    """Both models, as checkpoints and GGUF files, in a process of its own: its memory is not to be measured."""
    from graftlm.export.gguf import export_gguf
    from graftlm.pruning.saving import save_pruned

    tokenizer = load_tokenizer(options.model)
    for which in MODELS:
        if which == "pruned" and options.pruned:
            model: Any = load_model(str(options.pruned))
        else:
            model = load_model(options.model)
        if which == "pruned" and not options.pruned:
            model = randomly_pruned(model, options.share, options.uniform, options.multiple)
        save_pruned(model, tokenizer, options.folder / which)
        if "llama.cpp" in options.runtimes:
            export_gguf(model, tokenizer, options.folder / f"{which}.gguf", kind=options.quantize)


def ratio(key: str, pruned: Record, original: Record) -> list[float]:
    """Median of the ratios of neighbouring steps, and its 95% interval."""
    ratios = [a / b for a, b in zip(pruned.values(key), original.values(key), strict=True)]
    return [round(x, 4) for x in (statistics.median(ratios), *interval(ratios))]


def own_bytes(record: Record) -> int:
    """Peak of the process, less what Python and its libraries had taken before the model was opened."""
    return max(1, record.peak_bytes - record.said["before"])


def results(records: dict[str, Record], options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for runtime in options.runtimes:
        original, pruned = (records[f"{runtime}:{which}"] for which in MODELS)
        found[runtime] = {
            "prompt_tokens_per_second": [
                round(options.prompt / r.median("prompt_seconds"), 1) for r in (original, pruned)
            ],
            "new_tokens_per_second": [round(1 / r.median("token_seconds"), 2) for r in (original, pruned)],
            "own_mib": [round(own_bytes(r) / 2**20) for r in (original, pruned)],
            "prompt_seconds_ratio": ratio("prompt_seconds", pruned, original),
            "token_seconds_ratio": ratio("token_seconds", pruned, original),
            "own_memory_ratio": round(own_bytes(pruned) / own_bytes(original), 4),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="the original")
    parser.add_argument("--pruned", type=Path, metavar="DIR", help="the pruned model (default: pruned here, at random)")
    parser.add_argument("--share", type=float, default=0.4, help="of heads and channels that goes (default 0.4)")
    parser.add_argument("--uniform", action="store_true", help="the same from every layer")
    parser.add_argument("--multiple", type=int, default=32, help="channels are a multiple of it (default 32)")
    parser.add_argument("--prompt", type=int, default=256, metavar="N", help="tokens read in a step")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens written in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quantize", default="f32", help="of the GGUF files: f32, f16, bf16, q8_0")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    options.runtimes = RUNTIMES if llama_cpp.is_installed() else RUNTIMES[:1]
    with tempfile.TemporaryDirectory(prefix="pruned-speed-") as folder:
        options.folder = Path(folder)
        worker = torch.multiprocessing.get_context("spawn").Process(target=prepare, args=(options,))
        worker.start()
        worker.join()
        if worker.exitcode:
            raise SystemExit("the models could not be prepared; the error is above")
        config = json.loads((options.folder / "original" / "config.json").read_text(encoding="utf-8"))
        options.vocabulary = config["vocab_size"]
        names = [f"{runtime}:{which}" for runtime in options.runtimes for which in MODELS]
        records = take_turns(way, names, options, options.rounds)
    said = [records[f"transformers:{which}"].said for which in MODELS]
    result: dict[str, Any] = {
        "model": options.model,
        "pruned": str(options.pruned)
        if options.pruned
        else f"random, share {options.share}, {options.multiple} channels",
        "uniform": options.uniform,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "threads": options.threads,
        "gguf": options.quantize,
        "left": {key: round(said[1][key] / said[0][key], 4) for key in said[0] if key != "before"},
        **results(records, options),
    }
    if options.out:
        write_json(options.out, {**result, "environment": describe_environment()})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
