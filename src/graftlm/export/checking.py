"""Whether a GGUF file computes what the model does: llama.cpp's tokens and log-probabilities against ours."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftlm.errors import UserError
from graftlm.export.llama_cpp import ask
from graftlm.export.vocabulary import prefixes_first_only

TOLERANCE = 1e-3
"""Float32: largest difference of a log-probability, in nats, that is no mistake. Random tiny models differ by 1e-6,
SmolLM2-135M, whose activations reach 20,000, by up to 1e-4."""

GELU_TOLERANCE = 5e-3
"""llama.cpp looks GELU up in a table of float16."""

CORRELATION = {"f16": 0.9, "bf16": 0.8, "q8_0": 0.5}
"""Fewer bits: least correlation of the log-probabilities with the model's, over positions on average. llama.cpp rounds
the activations as well, so this tells a rounded model from a wrong one and no more."""

FLOAT64_UP_TO = 5 * 10**8
"""Parameters of a model that is run in float64: of two float32 runs, nobody knows whose rounding is seen."""

TEXT = "The quick brown fox jumps over the lazy dog, and 12 others do not."
TEXTS = (
    "I'm sure you'll see: it's 1234567 or 3.14159e-10; don't.\n\n  def f(a, b=2):\n\treturn a+b  # ok?!\r\n",
    "naïve café Straße ΑΒΓδε русский 中文字符 日本語 한국어 ½ ²³ 🙂👍🏽",
    "camelCaseHTTPServer snake_case //comment ...---=== $100,000.00 <tag>   trailing  ",
)
POSITIONS = 12
COUNT = 256


@dataclass(frozen=True)
class Check:
    """What running the file showed."""

    difference: float
    """Largest of a log-probability, in nats."""
    divergence: float
    """Kullback-Leibler divergence of the next token from the model's, in nats, over positions on average."""
    correlation: float
    """Of the log-probabilities with the model's, over positions on average."""
    positions: int
    same_first: int
    """Positions at which both find the same token likeliest."""
    texts: int
    """Tokenised alike."""

    def __str__(self) -> str:
        return (
            f"run with llama.cpp: log-probabilities differ from the model's by {self.difference:.1e} nats at most "
            f"(divergence {self.divergence:.1e}, correlation {self.correlation:.3f}), the likeliest token is the same "
            f"at {self.same_first} of {self.positions} positions; {self.texts} texts are tokenised alike"
        )


@torch.inference_mode()
def check(file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str, threads: int = 1) -> Check:
    """Run `file` with llama.cpp beside `model` on a short text, and let both tokenise others.

    `model` is float64 afterwards, or where it is large float32 for a file of float32, and as it is for others. Raises
    UserError where the two differ by more than numbers of that `kind` explain, or in a token, and when llama.cpp does
    not take the file.
    """
    if model.num_parameters() <= FLOAT64_UP_TO:
        model = model.double()
    elif kind not in CORRELATION:
        model = model.float()
    texts = [*TEXTS, *_with_specials(tokenizer)]
    ids = tokenizer(TEXT)["input_ids"][:POSITIONS]
    if not ids:
        raise UserError(f"export: the tokenizer makes no tokens of {TEXT!r}; there is nothing to check with")
    log_probabilities = (
        model(torch.tensor([ids], device=model.device)).logits[0].double().log_softmax(-1).cpu()
    )  # [S, V]
    count = min(COUNT, log_probabilities.shape[-1])
    answers = ask(file, texts, [ids[: n + 1] for n in range(len(ids))], count, threads)
    compared_at, same = [], 0
    for ours, theirs in zip(log_probabilities, answers.log_probabilities, strict=True):
        compared_at.append(compared(ours, theirs))
        same += max(theirs, key=lambda token: theirs[token]) == int(ours.argmax())
    for text, theirs_tokens in zip(texts, answers.tokens, strict=True):
        ours_tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ours_tokens != theirs_tokens:
            at = next((i for i, (a, b) in enumerate(zip(ours_tokens, theirs_tokens, strict=False)) if a != b), None)
            word = tokenizer.decode(ours_tokens[at : at + 3]) if at is not None else text[-10:]
            raise UserError(
                f"export: llama.cpp tokenises {word!r} of {text[:40]!r} otherwise than the tokenizer; the file was not "
                "kept (--no-check keeps it)"
            )
    differences, divergences, correlations = zip(*compared_at, strict=True)
    found = Check(max(differences), mean(divergences), mean(correlations), len(ids), same, len(texts))
    if kind in CORRELATION:
        wrong = not found.correlation >= CORRELATION[kind]
    else:
        wrong = not found.difference <= tolerance_of(model)
    if wrong:
        raise UserError(f"export: {found}: more than rounding explains, so the file was not kept (--no-check keeps it)")
    return found


def compared(ours: torch.Tensor, theirs: dict[int, float]) -> tuple[float, float, float]:
    """Largest difference of the log-probabilities of the tokens that llama.cpp reported, their divergence (both in
    nats), and their correlation.

    `ours`: log-probabilities or logits [V]. Both are normalised anew over these tokens: llama.cpp's server adds up the
    whole vocabulary one by one in float32, so that its log-probabilities are all off by the same 2e-4 at 49,152 tokens.
    """
    tokens = torch.tensor(list(theirs))
    expected = ours[tokens].double().log_softmax(-1)
    found = torch.tensor(list(theirs.values()), dtype=torch.float64).log_softmax(-1)
    difference = expected - found
    correlation = torch.corrcoef(torch.stack([expected, found]))[0, 1]
    return float(difference.abs().max()), float((expected.exp() * difference).sum()), float(correlation)


def tolerance_of(model: PreTrainedModel) -> float:
    """Of log-probabilities in float32, in nats."""
    config: Any = model.config.get_text_config()
    activation = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))
    return GELU_TOLERANCE if "gelu" in activation else TOLERANCE


def _with_specials(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts with special tokens in them, followed by words and by white space, as in chat templates; none where
    llama.cpp is known to read such text otherwise (vocabulary.AFTER_SPECIAL)."""
    if prefixes_first_only(json.loads(tokenizer.backend_tokenizer.to_str())):
        return []
    specials = list(dict.fromkeys(tokenizer.all_special_tokens))[:8]
    return ["".join(f"{token}{space}word{i}" for i, token in enumerate(specials)) + " end" for space in ("", "\n ")]
