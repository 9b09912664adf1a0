"""What `graftlm export` does: read its arguments, write the file or folder, print what came of it."""

import argparse
import contextlib
import glob
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.files import check_whole_folder, remove_unfinished

FORMATS = ("gguf", "padded", "stock")


def add_verb(verb: Callable[..., Any], model_help: str) -> None:
    """Give the command line the verb. `verb` as in graftlm.pruning.cli."""
    parser = verb(
        "export",
        export,
        "a model for other programs: GGUF for llama.cpp",
        "Write a model, pruned or not, as one GGUF file with its tokenizer and chat template, and run it: llama.cpp's\n"
        "log-probabilities and tokens are compared with the model's own (needs pip install 'graftlm[export]'). Layers\n"
        "of different widths go to llama.cpp's architectures `deci` (like Llama, Mistral, Qwen2, Phi-3) and `openelm`\n"
        "(like Qwen3, tied embeddings). --format padded fills every layer up with zeros to the widest: a stock\n"
        "checkpoint for programs that need one, the same function, none of the speed. Details: docs/export.md",
        "graftlm export runs/small --format gguf --quantize f16",
        "llama-server -m runs/small/small-f16.gguf",
    )
    parser.add_argument("model", metavar="MODEL", help=model_help)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="gguf",
        help="gguf (default): a file for llama.cpp; padded: a stock checkpoint, as wide as the widest layer; stock: a "
        "copy, if the checkpoint is stock already",
    )
    parser.add_argument(
        "--quantize",
        metavar="KIND",
        help="numbers of a GGUF file: f32, f16, bf16 or q8_0 (default: as the weights are stored); q8_0 needs widths "
        "that are multiples of 32 (graftlm prune --width-multiple 32); smaller ones: llama.cpp's llama-quantize, from "
        "an f16 file (K-quants need multiples of 256)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="the .gguf file (default: in the model's folder, else here), or the folder of the other formats",
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="run the file with llama.cpp, keep it only if it computes the same (default: if xllamacpp is installed)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def export(args: argparse.Namespace) -> None:
    """The verb."""
    if args.format != "gguf" and args.quantize is not None:
        raise UserError(
            f"export: --quantize is for --format gguf; --format {args.format} keeps the weights as they are"
        )
    if args.format != "gguf" and args.check:
        raise UserError(f"export: --check runs a GGUF file; --format {args.format} writes none")
    if args.format == "gguf":
        _gguf(args)
    else:
        _folder(args)


def _gguf(args: argparse.Namespace) -> None:
    import gc

    import torch

    from graftlm.export import llama_cpp
    from graftlm.export.checking import check
    from graftlm.export.gguf import check_kind, export_gguf
    from graftlm.models import check_vocabulary, load_tokenizer

    if args.check and not llama_cpp.is_installed():
        raise UserError(f"export: --check needs xllamacpp, which is not installed: {llama_cpp.INSTALL}")
    if args.quantize is not None:
        check_kind(args.quantize)
    if args.out is not None:
        _check_file(args.out, args.model)
    model = _load(args.model, args.trust_remote_code)
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    check_vocabulary(model, tokenizer)
    kind = args.quantize or {torch.bfloat16: "bf16", torch.float16: "f16"}.get(model.dtype, "f32")
    out = args.out or _default_file(args.model, kind)
    _check_file(out, args.model)
    found: list[Any] = []

    def inspect(file: Path) -> None:
        if args.check is False or not llama_cpp.is_installed():
            return
        gc.collect()
        found.append(check(file, model, tokenizer, kind, threads=torch.get_num_threads()))

    written = export_gguf(
        model,
        tokenizer,
        out,
        kind=kind,
        name=Path(args.model).name.removesuffix(".gguf"),
        licence=licence_of(Path(args.model)),
        heard=_progress,
        inspect=inspect,
    )
    print(
        f"{written.path}: {written.architecture}, {written.kind}, {written.tensors} tensors, "
        f"{written.size / 2**20:.1f} MiB"
    )
    for note in written.notes:
        print(f"note: {note}")
    if found:
        print(found[0])
    elif args.check is False:
        print("not run (--no-check)")
    else:
        print(f"not run: xllamacpp is not installed ({llama_cpp.INSTALL}); it would check the file with llama.cpp")


def _check_file(out: Path, model: str) -> None:
    """Raise UserError where something stands there that a GGUF file must not replace."""
    if out.is_dir():
        raise UserError(f"export: --out {out} is a folder; name the file, e.g. {out / 'model.gguf'}")
    if not out.exists():
        return
    if out.resolve() == Path(model).resolve():
        raise UserError(f"export: --out {out} is the model itself; name another file")
    with out.open("rb") as file:
        if file.read(4) not in (b"GGUF", b""):
            raise UserError(f"export: --out {out} is there and no GGUF file; name another, or delete it")


def _folder(args: argparse.Namespace) -> None:
    from graftlm.anatomy import is_per_layer
    from graftlm.export.card import copied_card, padded_card
    from graftlm.models import is_stock, load_tokenizer, save_model
    from graftlm.pruning.shapes import shapes_of

    if args.out is None:
        raise UserError(f"export: --format {args.format} writes a folder; name it: --out DIR")
    if args.out.is_file():
        raise UserError(f"export: --out {args.out} is a file; --format {args.format} writes a folder")
    check_whole_folder(args.out)
    if args.out.resolve() == Path(args.model).resolve():
        raise UserError("export: --out is the model's own folder; name another")
    if args.out.is_dir() and any(args.out.iterdir()):
        raise UserError(f"export: --out {args.out} is there and not empty; name another folder, or delete it")
    remove_unfinished(args.out.parent, glob.escape(args.out.name))  # of an export that was killed
    model = _load(args.model, args.trust_remote_code)
    model_type = str(model.config.model_type)
    stock = is_stock(model)
    if args.format == "stock" and not stock:
        padding = "; --format padded makes it one, at the size of its widest layer"
        raise UserError(
            f"export: {args.model} is of model type {model_type}, and no stock checkpoint"
            f"{padding if is_per_layer(model.config) else ''}"
        )
    if stock:
        print(f"{args.model} is a stock {model_type} checkpoint already; it is saved as it is")
        card = copied_card(args.model)
    else:
        from graftlm.pruning.padding import padded

        before, shapes = model.num_parameters(), shapes_of(model)
        model = padded(model)
        shape = shapes_of(model)[0]
        card = padded_card(args.model, shapes, shape, before, model.num_parameters())
        print(
            f"padded to {shape.num_attention_heads} heads, {shape.num_key_value_heads} groups and "
            f"{shape.intermediate_size} channels in every layer: {before:,} -> {model.num_parameters():,} parameters"
        )
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    save_model(model, tokenizer, args.out, card=card)
    print(f"{args.out}: opens with AutoModelForCausalLM, as model type {model.config.model_type}")


def _load(name: str, trust_remote_code: bool) -> Any:
    """The model in the number format that its weights are stored in, so that it takes no more memory than they do."""
    from transformers import PretrainedConfig

    from graftlm.models import BUILT_IN, load_model
    from graftlm.quiet import quiet_transformers

    dtype = None
    if name not in BUILT_IN and not name.endswith(".gguf"):
        with contextlib.suppress(OSError, ValueError), quiet_transformers():  # load_model says what is wrong
            stored: dict[str, Any] = PretrainedConfig.get_config_dict(name)[0]
            dtype = stored.get("dtype") or stored.get("torch_dtype")
    kept = dtype if dtype in ("bfloat16", "float16") else "float32"
    return load_model(name, dtype=kept, trust_remote_code=trust_remote_code)


def _default_file(model: str, kind: str) -> Path:
    path = Path(model)
    if path.is_dir():
        return path / f"{path.resolve().name}-{kind}.gguf"
    return Path(f"{path.name.removesuffix('.gguf')}-{kind}.gguf")


def licence_of(folder: Path) -> str | None:
    """What the model card in `folder` says its licence is."""
    from graftlm.reporting.card import source_card

    found = source_card(str(folder))[0].get("license")
    return str(found) if isinstance(found, str) else None


def _progress(done: int, tensors: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {tensors} tensors", end="\n" if done == tensors else "", file=sys.stderr, flush=True)
