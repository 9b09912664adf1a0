"""Whether a GGUF file computes what the model does: llama.cpp's tokens and log-probabilities against ours."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftlm.errors import UserError
from graftlm.export.gguf import KINDS
from graftlm.export.llama_cpp import ask
from graftlm.export.rounding import computing
from graftlm.export.vocabulary import prefixes_first_only

TOLERANCE = 1e-3
"""Float32: largest difference of a log-probability, in nats, that is no mistake. Random tiny models differ by 1e-6,
SmolLM2-135M, whose activations reach 20,000, by up to 1e-4."""

GELU_TOLERANCE = 5e-3
"""llama.cpp looks GELU up in a table of float16."""

UNEXPLAINED = 4.0
"""Fewer bits: how far llama.cpp may be from the model rounded as llama.cpp rounds (rounding.py), in units of how far
rounding took that from the model (divergences). Two roundings that share nothing would be 2 apart; tiny models are 0.03
apart at most, SmolLM2-135M, whose activations reach 20,000, 0.8."""

FLOAT64_UP_TO = 5 * 10**8
"""Parameters of a model that is run in float64, others in float32: of two float32 runs, nobody knows whose rounding is
seen."""

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
    unexplained: float | None
    """Fewer bits: the same divergence, but from the model rounded as llama.cpp rounds; None of float32."""
    positions: int
    same_first: int
    """Positions at which both find the same token likeliest."""
    texts: int
    """Tokenised alike."""

    def __str__(self) -> str:
        rounded = "" if self.unexplained is None else f"; from the model rounded alike {self.unexplained:.1e}"
        return (
            f"run with llama.cpp: log-probabilities differ from the model's by {self.difference:.1e} nats at most "
            f"(divergence {self.divergence:.1e}{rounded}), the likeliest token is the same at {self.same_first} of "
            f"{self.positions} positions; {self.texts} texts are tokenised alike"
        )


@torch.inference_mode()
def check(file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str, threads: int = 1) -> Check:
    """Run `file` with llama.cpp beside `model` on a short text, and let both tokenise others.

    Raises UserError where the two differ by more than numbers of that `kind` explain, or in a token, and when llama.cpp
    does not take the file.
    """
    texts = [*TEXTS, *_with_specials(tokenizer)]
    ids = tokenizer(TEXT)["input_ids"][:POSITIONS]
    if not ids:
        raise UserError(f"export: the tokenizer makes no tokens of {TEXT!r}; there is nothing to check with")
    with computing(model, dtype := torch.float64 if model.num_parameters() <= FLOAT64_UP_TO else torch.float32):
        ours = _log_probabilities(model, ids)  # [S, V]
    answers = ask(file, texts, [ids[: n + 1] for n in range(len(ids))], min(COUNT, ours.shape[-1]), threads)
    theirs = answers.log_probabilities
    for text, their_tokens in zip(texts, answers.tokens, strict=True):
        our_tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if our_tokens != their_tokens:
            at = next((i for i, (a, b) in enumerate(zip(our_tokens, their_tokens, strict=False)) if a != b), None)
            word = tokenizer.decode(our_tokens[at : at + 3]) if at is not None else text[-10:]
            raise UserError(
                f"export: llama.cpp tokenises {word!r} of {text[:40]!r} otherwise than the tokenizer; the file was not "
                "kept (--no-check keeps it)"
            )
    difference, divergence = _over_positions(ours, theirs)
    unexplained = None
    wrong = not difference <= tolerance_of(model)
    if kind != "f32":
        with computing(model, dtype, KINDS[kind][0]):
            rounded = _log_probabilities(model, ids)
        unexplained = _over_positions(rounded, theirs)[1]
        unrounded = [{token: float(our[token]) for token in row} for our, row in zip(ours, theirs, strict=True)]
        explained = _over_positions(rounded, unrounded)[1]
        wrong = not unexplained <= max(UNEXPLAINED * explained, tolerance_of(model) ** 2)
    same = sum(max(row, key=row.__getitem__) == int(our.argmax()) for our, row in zip(ours, theirs, strict=True))
    found = Check(difference, divergence, unexplained, len(ids), same, len(texts))
    if wrong:
        raise UserError(f"export: {found}: more than rounding explains, so the file was not kept (--no-check keeps it)")
    return found


def _log_probabilities(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Of the next token after each of `ids`, [S, V]."""
    return model(torch.tensor([ids], device=model.device)).logits[0].double().log_softmax(-1).cpu()


def _over_positions(ours: torch.Tensor, theirs: list[dict[int, float]]) -> tuple[float, float]:
    """Largest difference, and mean divergence, of `compared` over positions; ours [S, V]."""
    differences, divergences = zip(*map(compared, ours, theirs), strict=True)
    return max(differences), mean(divergences)


def compared(ours: torch.Tensor, theirs: dict[int, float]) -> tuple[float, float]:
    """Largest difference of the log-probabilities of the tokens that llama.cpp reported, and their divergence, both in
    nats.

    `ours`: log-probabilities or logits [V]. Both are normalised anew over these tokens: llama.cpp's server adds up the
    whole vocabulary one by one in float32, so that its log-probabilities are all off by the same 2e-4 at 49,152 tokens.
    """
    tokens = torch.tensor(list(theirs))
    expected = ours[tokens].double().log_softmax(-1)
    found = torch.tensor(list(theirs.values()), dtype=torch.float64).log_softmax(-1)
    difference = expected - found
    return float(difference.abs().max()), float((expected.exp() * difference).sum())


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
