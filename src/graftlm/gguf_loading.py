"""GGUF files: unpacked to plain weights once, then kept in the cache as an ordinary checkpoint.

Unpacking takes about 20 s for a 100 MB file, most of it in parsing the vocabulary in Python; the kept copy opens in
about one second.
"""

import contextlib
import hashlib
import logging
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from graftlm.errors import UserError
from graftlm.files import atomic_folder, cache_root, read_json, write_json

logger = logging.getLogger(__name__)

KEEP_AT_MOST = 4 * 2**30
"""Bytes of unpacked weights above which a model is not kept: a home folder is no place for tens of gigabytes that
nobody asked for."""

SPLIT_DIGITS = ("smollm",)
"""Values of `tokenizer.ggml.pre` whose tokenizers split every digit off. transformers does not know them and falls
back to GPT-2's splitting, which tokenises white space before a digit in a way that the model was not trained on."""

STAMP = "source.json"


def open_pretrained(source: Path | str, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """transformers' loader with its loading report (its annotations do not know that this makes it return two)."""
    model, report = cast(Any, AutoModelForCausalLM).from_pretrained(source, output_loading_info=True, **kwargs)
    return model, report


def load_gguf_model(file: Path, *, dtype: torch.dtype, attn_implementation: str | None) -> tuple[PreTrainedModel, dict]:
    """The model in `file`, every weight unpacked to `dtype`, and transformers' loading report.

    Raises whatever transformers or gguf raise for a file that they cannot read.
    """
    kwargs: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    folder = _kept_folder(file, str(dtype).removeprefix("torch."))
    if _is_current(folder, file):
        # A kept copy that somebody has damaged, or is just clearing away, is made again.
        with contextlib.suppress(OSError, SafetensorError):
            return open_pretrained(folder, **kwargs)
    model, report = open_pretrained(
        file.parent,
        gguf_file=file.name,
        # Else transformers keeps the weights in their blocks where it has a kernel for them, and in any case marks the
        # model as quantised: it can then neither be trained nor saved.
        quantization_config=GgufConfig(dequantize=True),
        **kwargs,
    )
    if model.get_memory_footprint() <= KEEP_AT_MOST and not report["missing_keys"]:
        _keep(model, folder, file)
    return model, report


def load_gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `file`, splitting text as the file says it must be split."""
    folder = _kept_folder(file, "tokenizer")
    if _is_current(folder, file):
        return AutoTokenizer.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if _pre_tokenizer_name(file) in SPLIT_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    _keep(tokenizer, folder, file)
    return tokenizer


def _pre_tokenizer_name(file: Path) -> str | None:
    from gguf import GGUFReader  # parses for seconds: only when a file is seen for the first time

    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


def architecture_of(file: Path) -> str | None:
    """What `file` says its model is; None where it cannot be read."""
    from gguf import GGUFReader

    with contextlib.suppress(Exception):  # whatever a torn file makes the reader raise
        field = GGUFReader(file).get_field("general.architecture")
        return None if field is None else str(field.contents())
    return None


def _kept_folder(file: Path, kind: str) -> Path:
    key = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]
    return cache_root() / "gguf" / f"{file.stem}-{key}-{kind}"


def _stamp(file: Path) -> dict[str, object]:
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "transformers": transformers.__version__}


def _is_current(folder: Path, file: Path) -> bool:
    try:
        return read_json(folder / STAMP) == _stamp(file)
    except (UserError, OSError):
        return False


def _keep(thing: PreTrainedModel | PreTrainedTokenizerBase, folder: Path, file: Path) -> None:
    """Save `thing` as `folder`. A cache that cannot be written costs time at the next start, and nothing else."""
    try:
        with atomic_folder(folder) as temporary:
            thing.save_pretrained(temporary)
            write_json(temporary / STAMP, _stamp(file))
    except Exception as error:  # whatever a full disk makes the savers raise (safetensors' own error among them)
        logger.info("%s is not kept in the cache: %s", file.name, error)
