"""A tokenizer in the terms of GGUF: llama.cpp must split text as the tokenizer does."""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from graftlm.errors import UserError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])


def _by_digits(count: str) -> str:
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{count}{_REST}"


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
WAYS: dict[str, tuple[pre_tokenizers.PreTokenizer, bool]] = {
    "gpt-2": (_GPT2, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]), False),
    "llama-bpe": (_split(_by_digits("{1,3}")), True),
    "dbrx": (_split(_by_digits("{1,3}")), False),
    "qwen2": (_split(_by_digits("")), False),
    "tekken": (_split(rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}{_CASED_REST}"), True),
    "gpt-4o": (_split(rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}{_CASED_REST}"), False),
}
"""llama.cpp's name (tokenizer.ggml.pre) -> how text is split before byte-pair encoding, and whether a piece that
is a token as a whole is taken as it is (ignore_merges). The patterns are those of the tokenizers that the names are
of."""

PROBE = (
    "I'm sure YOU'LL see: it's 1234567 or 3.14159e-10, x1y22z333; don't we've THEY'RE\n\n  def f(a, b=2):\n"
    "\treturn a+b  # ok?!\r\n   \n \tnaïve café Straße ΑΒΓδε русский 中文字符 日本語 한국어 ١٢٣ ½ ²³ हिन्दी "
    "🙂👍🏽 camelCaseHTTPServer snake_case//comment/* */ ...---=== $100,000.00 <tag>  trailing  "
)
"""Text on which the ways differ."""

PHI3_MARKS = ("phi-3", "phi3")
PHI3_ASKS_FOR = ("</s>", "<unk>", "<s>", "<|endoftext|>")
"""Tokens without which llama.cpp refuses a file of such a name."""
AFTER_SPECIAL = (
    "llama.cpp puts a space before text that follows a special token, this tokenizer does so at the beginning alone; "
    "what chat templates write differs by that"
)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to tokenise."""

    model: str
    """gpt2: byte-level byte-pair encoding; llama: SentencePiece's."""
    way: str
    """tokenizer.ggml.pre."""
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float] | None
    space_prefix: bool | None
    notes: tuple[str, ...] = ()
    """What somebody who uses the file must know."""


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The tokenizer's vocabulary, filled up to the embedding's `rows`.

    Raises UserError for a kind of tokenizer that llama.cpp has no like of.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("export: the tokenizer has no tokenizer.json (a tokenizer in Python code); GGUF cannot hold it")
    described = json.loads(backend.to_str())
    kind = described["model"]["type"]
    if kind != "BPE":
        raise UserError(f"export: a {kind} tokenizer; byte-pair encodings (BPE) can be put into GGUF, others not yet")
    tokens, types = _tokens(tokenizer, described, rows)
    merges = [m if isinstance(m, str) else " ".join(m) for m in described["model"]["merges"]]
    if "ByteLevel" in json.dumps([described["pre_tokenizer"], described["decoder"]]):
        if (described["normalizer"] or {}).get("type") not in (None, "NFC"):
            raise UserError(f"export: the tokenizer normalises text ({described['normalizer']['type']}); GGUF cannot")
        way = way_of(backend, bool(described["model"].get("ignore_merges")))
        return Vocabulary("gpt2", way, tokens, types, merges or [_never(tokenizer)], None, None)
    prefix = _space_prefix(backend)
    notes = (AFTER_SPECIAL,) if prefix and prefixes_first_only(described) else ()
    types = [_sentencepiece_type(t, kind, described) for t, kind in zip(tokens, types, strict=True)]
    scores = _scores(tokens, described)
    for added in described["added_tokens"]:
        if not added["special"]:  # llama.cpp writes them as they are, and spaces of other tokens as spaces
            tokens[added["id"]] = added["content"].replace(_SPACE, " ")
    return Vocabulary("llama", "default", tokens, types, [], scores, prefix, notes)


def prefixes_first_only(described: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before the text alone, and not after special tokens in it too, as
    llama.cpp does. `described`: its tokenizer.json."""
    pre_tokenizer = described["pre_tokenizer"] or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return any(step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first" for step in steps)


def name_in_file(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`name` such that llama.cpp treats white space behind special tokens as the tokenizer does: of files whose name
    has "phi-3" in it, and of no others, it leaves it out."""
    known = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder.values()
    strips = any(token.special and token.rstrip for token in added) and all(one in known for one in PHI3_ASKS_FOR)
    marked = any(mark in name.lower() for mark in PHI3_MARKS)
    if strips and not marked:
        return f"{name} ({PHI3_MARKS[0]})"
    return re.sub(r"(?i)phi-?3", "phi 3", name) if marked and not strips else name


def way_of(backend: Tokenizer, ignore_merges: bool) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer splits text. Raises UserError where it has none."""
    pre_tokenizer: Any = backend.pre_tokenizer
    pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str(PROBE)] if pre_tokenizer else [PROBE]
    for name, (way, ignores) in WAYS.items():
        if ignores == ignore_merges and pieces == [piece for piece, _ in way.pre_tokenize_str(PROBE)]:
            return name
    raise UserError(
        f"export: the tokenizer splits text in a way that llama.cpp has no name for among {', '.join(WAYS)}; "
        "its own converter (convert_hf_to_gguf.py) may know this model's"
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, described: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, i in tokenizer.get_vocab().items():
        if i >= rows:
            raise UserError(
                f"export: the tokenizer has a token {i}, the model's embedding {rows} rows; they do not fit"
            )
        tokens[i], types[i] = token, int(TokenType.NORMAL)
    for added in described["added_tokens"]:
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    return tokens, types


def _never(tokenizer: PreTrainedTokenizerBase) -> str:
    """A merge that nothing is merged by, since its parts are never pieces: llama.cpp asks for one at least."""
    return f"<{tokenizer.eos_token}> <{tokenizer.eos_token}>"


def _space_prefix(backend: Tokenizer) -> bool:
    """Whether text begins with a space, as SentencePiece's tokenizers have it. Raises UserError for others."""
    text = "a  b"
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    if text.removeprefix(_SPACE) != f"a{_SPACE}{_SPACE}b":
        raise UserError(f"export: neither a byte-level tokenizer nor SentencePiece's ('a  b' becomes {text!r})")
    return text.startswith(_SPACE)


def _sentencepiece_type(token: str, kind: int, described: dict[str, Any]) -> int:
    if token == described["model"].get("unk_token"):
        return int(TokenType.UNKNOWN)
    return int(TokenType.BYTE) if _BYTE.fullmatch(token) else kind


def _scores(tokens: list[str], described: dict[str, Any]) -> list[float]:
    """Of every token: the earlier its merge, the higher. SentencePiece joins the pair of highest score first."""
    first: dict[str, float] = {}
    for rank, merge in enumerate(described["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        first.setdefault(left + right, -float(rank))
    last = -float(len(described["model"]["merges"]))
    return [first.get(token, last) for token in tokens]


def write_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Add the tokenizer, its special tokens and its chat template to a file's metadata."""
    vocabulary = read_vocabulary(tokenizer, rows)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.way)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores([float(np.float32(score)) for score in vocabulary.scores])
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    with_special, without = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    writer.add_add_bos_token(len(with_special) > len(without) and with_special[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(with_special) > len(without) and with_special[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)
    return vocabulary
