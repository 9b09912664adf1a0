"""What a run computes and holds, counted from shapes: floating-point operations and bytes, nothing measured.

T tokens a row, L layers, H query heads, d_qk and d_v their widths, k dimensions of P, a and b Monarch's blocks.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from graftlm.anatomy import decoder_layers
from graftlm.apex import Apex
from graftlm.budget import component_size, matrices_that_train
from graftlm.expansion import Tie
from graftlm.operators import Dense, Monarch, Operator

FORMULA = "tokens x (6 x matmul parameters + 6 x L x H x (d_qk + d_v) x T), attention not halved for causality"
FORMULA_PARTLY = (
    "tokens x (2 x matmul parameters forward + 2 x those that gradients pass through + 2 x those that train + "
    "6 x L x H x (d_qk + d_v) x T), attention not halved for causality"
)


@dataclass
class TokenFlops:
    """Floating-point operations of one token (a multiplication and an addition are two), in a part of the model."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "TokenFlops") -> "TokenFlops":
        return TokenFlops(self.forward + other.forward, self.backward + other.backward)


@dataclass
class OperatorFlops:
    """Floating-point operations of M x, of M^T g, and of the gradients of both, for k x `columns` panels."""

    apply: int
    adjoint: int
    pull_back: int


def operator_flops(operator: Operator, columns: int) -> OperatorFlops:
    """Of the matrix products in operators.py; element by element products (diagonal R) are not counted.

    Monarch: 2 k (a + b) a column for M x and for M^T g, and for the pull back once more M's inner half and both
    factors' gradients.
    """
    if isinstance(operator, Dense):
        once = 2 * operator.k**2 * columns
        return OperatorFlops(once, once, 2 * once)
    assert isinstance(operator, Monarch)
    padded, a = operator.a * operator.b, operator.a
    inner = 0 if operator.diagonal else operator.b
    once = 2 * padded * (a + inner) * columns
    return OperatorFlops(once, once, 2 * padded * (2 * a + 3 * inner) * columns)


def linear_weights(module: nn.Module) -> dict[str, int]:
    """Weights of every nn.Linear by path: each multiplies every token (a tied LM head counts, embeddings do not)."""
    return {name: m.weight.numel() for name, m in module.named_modules() if isinstance(m, nn.Linear)}


def attention_width(model: PreTrainedModel) -> int:
    """H (d_qk + d_v) of one layer."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_attention_heads * head_dim


def token_flops(model: PreTrainedModel, apex: Apex | None, length: int) -> tuple[TokenFlops, TokenFlops]:
    """Of one token in a row of `length`: of all decoder layers, and of the rest (the LM head).

    `apex`: built on `model`, or None where everything trains plainly. Recomputation (gradient checkpointing) is not
    counted: it is no work that the model needs.
    """
    path, layers = decoder_layers(model)
    weights = linear_weights(model)
    gradients = {name: size for name, size in weights.items() if model.get_submodule(name).weight.requires_grad}
    routes = 0
    if apex is not None and apex.slices is not None:
        for matrix in (m for b in apex.anatomy.blocks for m in matrices_that_train(b, apex.budget.followers)):
            found = apex.slices.slice_of(matrix.module)
            if found is not None:
                gradients[matrix.module] = found.weight.numel()
        routes = sum(_route_flops(apex, tie) for tie in apex.ties if tie.by_tokens)
    reached = dict(weights)
    attention = attention_width(model) * length
    skipped = 0
    if not model.get_input_embeddings().weight.requires_grad:  # type: ignore[operator]
        # Nothing before the first layer trains, so its input needs no gradient; nor do its queries and keys, unless a
        # fused projection makes them together with the values.
        first = [b for b in apex.anatomy.blocks if b.kind == "heads" and b.layer == 0] if apex is not None else []
        for matrix in (m for b in first for m in (*b.mixed, *b.followers) if m.dim == 0):
            reached.pop(matrix.module, None)
        fused = any({m.module for m in b.mixed} & {m.module for m in b.followers} for b in first)
        skipped = 0 if fused else 3 * attention
    inside = f"{path}."
    return (
        TokenFlops(
            2 * _sum(weights, inside) + 2 * attention * len(layers),
            2 * _sum(reached, inside) + 2 * _sum(gradients, inside) + 4 * attention * len(layers) - skipped + routes,
        ),
        TokenFlops(
            2 * _sum(weights, inside, outside=True),
            2 * _sum(reached, inside, outside=True) + 2 * _sum(gradients, inside, outside=True),
        ),
    )


def _sum(sizes: dict[str, int], prefix: str, outside: bool = False) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(prefix) is not outside)


def _route_flops(apex: Apex, tie: Tie) -> int:
    """A token's share in an operator whose gradient is read off token by token (slices.py)."""
    total = 0
    for matrix in tie.matrices:
        cost = operator_flops(tie.operator, matrix.slots)
        pulls_inputs = matrix.dim == 1 and apex.budget.blocks[tie.block.name].p > 0
        total += cost.pull_back + (cost.adjoint if pulls_inputs else 0)
    return total


def panel_columns(model: nn.Module, tie: Tie) -> int:
    """Columns of everything that a tie's operator acts on, side by side."""
    columns = 0
    for piece in tie.pieces:
        weight = model.get_parameter(piece.name)
        columns += piece.matrix.slots * (weight.shape[1 - piece.dim] if weight.dim() == 2 else 1)
    return columns


def step_flops(apex: Apex) -> int:
    """Of the operators in one optimizer step, whatever its tokens: gradients pulled back, W~ written."""
    total = 0
    for tie in apex.ties:
        cost = operator_flops(tie.operator, panel_columns(apex.model, tie))
        total += cost.apply + (0 if tie.by_tokens else cost.pull_back)
    return total


def raw_bytes(apex: Apex) -> int:
    """The raw panels of N (and of P where diagonals change it) that are kept beside the effective weights."""
    total = 0
    for tie in apex.ties:
        for piece in tie.pieces:
            weight = apex.model.get_parameter(piece.name)
            panels = 1 if tie.scale_of(piece)[1] is None else 2
            other = weight.shape[1 - piece.dim] if weight.dim() == 2 else 1
            total += panels * tie.k * piece.matrix.slots * other * weight.element_size()
    return total


def weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def trained_in_layers(apex: Apex, layers: int) -> int:
    """Parameters of operators and slices in the first `layers` decoder layers."""
    operators = sum(p.numel() for tie in apex.ties if tie.block.layer < layers for p in tie.parameters())
    slices = 0
    for block in apex.anatomy.blocks:
        if block.layer < layers and block.name in apex.budget.blocks:
            counts = apex.budget.blocks[block.name]
            picked = counts.n + counts.p + counts.rest
            slices += picked * component_size(apex.model, block, apex.budget.followers)
    return operators + slices
