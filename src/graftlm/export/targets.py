"""Which architectures of llama.cpp hold which models: the table, and a word on why one does not.

Read in llama.cpp's source (src/models/*.cpp) and tried with every family: tests/test_export.py.
"""

from dataclasses import dataclass

from graftlm.errors import UserError
from graftlm.export.facts import Facts

PADDED = "`graftlm export MODEL --format padded --out DIR`, then export DIR"


@dataclass(frozen=True)
class Target:
    """One architecture of llama.cpp, as far as it matters which models it holds."""

    name: str
    per_layer: bool = False
    """Heads, groups and channels are arrays."""
    interleaved: bool = False
    """Rotates neighbouring dimensions, where transformers rotates the two halves of a head."""
    query_norm: str | None = None
    """Norm of queries and keys: over one head, over all of them, none."""
    fused: frozenset[str] = frozenset()
    """What lies in one tensor: qkv, gate_up."""
    biases: frozenset[str] = frozenset()
    """Roles (anatomy.Matrix) that may have a bias."""
    square: bool = False
    """Query heads times their width must be the hidden size."""
    tied: bool | None = None
    """Embeddings: must be tied, or must be written twice; None: either."""
    activation: str = "silu"
    ropes: frozenset[str] = frozenset({"default", "linear", "yarn"})
    partial_rope: bool = False
    step_without_rope: int | None = None
    """Every so many layers one has no rotary positions."""
    window: bool = False
    """Sliding attention in every second layer."""
    norm_offset: float = 0.0
    """Added to the weights of norms (Gemma's are stored less one)."""
    norms: tuple[tuple[str, str], ...] = (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"))
    """A layer's norms, and what they are called in the file."""


_ALL = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
_FACTORS = frozenset({"default", "linear", "yarn", "llama3"})
_AFTER = (("post_attention_layernorm", "post_attention_norm"), ("post_feedforward_layernorm", "post_ffw_norm"))
_GEMMA = {"activation": "gelu_pytorch_tanh", "norm_offset": 1.0, "tied": True}

TARGETS = {
    target.name: target
    for target in (
        Target("llama", interleaved=True, biases=_ALL, ropes=_FACTORS),
        Target("deci", per_layer=True, interleaved=True, biases=_ALL, ropes=_FACTORS),
        Target("qwen2", biases=frozenset("qkv"), square=True),
        Target("qwen3", query_norm="head"),
        Target("openelm", per_layer=True, query_norm="head", fused=frozenset({"qkv"}), tied=True),
        Target("smollm3", interleaved=True, biases=frozenset("qkv"), step_without_rope=4),
        Target(
            "phi3",
            fused=frozenset({"qkv", "gate_up"}),
            square=True,
            ropes=frozenset({"default", "longrope"}),
            partial_rope=True,
        ),
        Target("olmo2", query_norm="all", square=True, tied=False, norms=_AFTER),
        Target("gemma", **_GEMMA),  # type: ignore[arg-type]
        Target(
            "gemma2",
            **_GEMMA,  # type: ignore[arg-type]
            window=True,
            norms=(("input_layernorm", "attn_norm"), ("pre_feedforward_layernorm", "ffn_norm"), *_AFTER),
        ),
    )
}

CANDIDATES: dict[str, tuple[str, ...]] = {
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "qwen2": ("qwen2", "llama", "deci"),
    "qwen3": ("qwen3", "openelm"),
    "phi3": ("phi3", "llama", "deci"),
    "smollm3": ("smollm3", "llama", "deci"),
    "olmo2": ("olmo2",),
    "gemma": ("gemma",),
    "gemma2": ("gemma2",),
}
"""Family -> the targets that may hold it, the most its own first."""


def check_family(family: str) -> None:
    """Raises UserError for a model type that is not in the table."""
    if family not in CANDIDATES:
        raise UserError(
            f"export: no architecture of llama.cpp is known for model type {family}; it stays with transformers "
            f"(known: {', '.join(CANDIDATES)})"
        )


def choose_target(facts: Facts) -> Target:
    """The first that holds the model. Raises UserError, with what stands in the way of each and what can hold it."""
    reasons = []
    for name in CANDIDATES[facts.family]:
        reason = why_not(TARGETS[name], facts)
        if reason is None:
            return TARGETS[name]
        reasons.append(f"{name} {reason}")
    instead = f"; {PADDED}" if not facts.uniform else ""
    raise UserError(
        f"export: GGUF cannot hold this model: {'; '.join(reasons)}{instead}; transformers opens it as it is"
    )


def why_not(target: Target, facts: Facts) -> str | None:
    """Why `target` does not hold the model; None where it does."""
    heads = facts.shapes[0].num_attention_heads
    if not facts.uniform and not target.per_layer:
        return "takes layers of one width only"
    if extra := facts.biases - target.biases:
        return f"has no place for the biases of {', '.join(sorted(extra))}"
    if facts.norms - {target.query_norm} or (target.query_norm and not facts.norms):
        return "has other norms of queries and keys"
    if target.square and heads * facts.head_dim != facts.hidden:
        return f"needs heads x their width ({heads} x {facts.head_dim}) to be the hidden size {facts.hidden}"
    if target.tied and not facts.tied:
        return "needs tied embeddings"
    if target.activation != facts.activation:
        return f"computes {target.activation}, not {facts.activation}"
    if facts.rope.kind not in target.ropes:
        return f"has no {facts.rope.kind} rope scaling"
    if facts.rope.dimensions != facts.head_dim and not target.partial_rope:
        return f"rotates whole heads, not {facts.rope.dimensions} of {facts.head_dim} dimensions"
    step = target.step_without_rope
    if facts.rotated != tuple(step is None or (i + 1) % step != 0 for i in range(len(facts.shapes))):
        return f"has rotary positions in every layer{f' but each {step}th' if step else ''}"
    if target.window and facts.sliding != tuple(i % 2 == 0 for i in range(len(facts.shapes))):
        return "has sliding attention in every second layer"
    return None
