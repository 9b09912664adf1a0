"""What loaders of models and tokenizers raise, in one line that says what to do."""

import contextlib
import difflib
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from graftlm.errors import UserError
from graftlm.gguf_loading import architecture_of
from graftlm.quiet import quiet_transformers


@contextlib.contextmanager
def plain_loading_errors(name: str, source: Path | str, built_in: Sequence[str]) -> Iterator[None]:
    """Turn whatever the loaders raise over the MODEL `name`, which lies at `source`, into one line. built_in: names
    that a misspelt one may be meant for."""
    try:
        with quiet_transformers():
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explain(error, name, source, built_in)) from error


def _near(name: str, built_in: Sequence[str]) -> str:
    """The built-in name that `name` may be meant for, in brackets."""
    close = difflib.get_close_matches(name, built_in, n=1, cutoff=0.75)
    return f" (did you mean {close[0]}?)" if close else ""


def _explain(error: Exception, name: str, source: Path | str, built_in: Sequence[str]) -> str:
    text, near = str(error), _near(name, built_in)
    if isinstance(error, SafetensorError):
        torn = _torn_file(source) if isinstance(source, Path) else None
        return f"{torn or name}: the weights are torn ({text}); download or save them again"
    if "custom code" in text or "trust_remote_code" in text:
        return (
            f"{name}: needs Python code that comes with the model; read it, then give --trust-remote-code "
            "(of a run: trust_remote_code: true)"
        )
    if "couldn't connect" in text:
        return (
            f"{name}: no such folder here{near}, and the Hugging Face Hub was not reached; check the name and "
            "the network, or download the model elsewhere and name its folder (without a network, HF_HUB_OFFLINE=1 "
            "spares the wait)"
        )
    if "not a valid model identifier" in text:
        return (
            f"{name}: no such folder here{near} and no such model on the Hugging Face Hub (or a gated one: `hf "
            "auth login`)"
        )
    if "Error while initializing BPE" in text and name.endswith(".gguf"):
        return (
            f"{name}: its tokenizer has no merges, which transformers does not read from GGUF; name the folder that it "
            "was exported from"
        )
    if "backend tokenizer" in text:
        return f"{name}: has no tokenizer that can be read; save the tokenizer's files beside the model"
    if "ignore_mismatched_sizes" in text:
        return f"{name}: the weights have other shapes than config.json says; the two do not belong together"
    first_line = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if isinstance(error, StrictDataclassError):
        first_line = " ".join(text.split())  # the reason stands on the second line
    first_line = textwrap.shorten(first_line, 300, placeholder=" ...")  # transformers lists all that it knows
    if isinstance(source, Path) and source.is_file():
        unknown = any(words in text for words in ("Unrecognized", "does not recognize", "is not supported yet"))
        if unknown and (architecture := architecture_of(source)) is not None:
            return (
                f"{name}: a GGUF file of architecture {architecture}, which transformers does not read; name the "
                "folder that it was exported from (the file itself is for llama.cpp)"
            )
        return f"{name}: cannot be read as GGUF ({first_line}); the file is torn or of an unknown kind"
    return f"{name}: cannot be opened: {first_line}"


def _torn_file(folder: Path) -> Path | None:
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return file
    return None
