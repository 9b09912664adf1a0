"""What a run computes, holds and sends, counted from shapes: floating-point operations and bytes, nothing measured.

T tokens a row, L layers, H query heads, d_qk and d_v their widths, k dimensions of P, a and b Monarch's blocks.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from graftlm.anatomy import decoder_layers
from graftlm.apex import Apex
from graftlm.budget import component_size, matrices_that_train
from graftlm.operators import Dense, Monarch, Operator
from graftlm.ties import Tie
from graftlm.training.layout import Layout

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
class MethodFlops:
    """Where a model that another method has prepared differs from one that trains plainly."""

    products: dict[str, tuple[int, bool]]
    """Method.products."""
    gradients: dict[str, int]
    """Method.gradients."""
    unreached: set[str]
    """Modules of the first layer whose input needs no gradient, since nothing before them trains."""
    saved: int
    """Of the four products of the first layer's attention in the backward pass, those left out."""


@dataclass
class OperatorFlops:
    """Floating-point operations of M x, as many of M^T g, and of the gradients of both, for k x `columns` panels."""

    apply: int
    pull_back: int


def operator_flops(operator: Operator, columns: int) -> OperatorFlops:
    """Of the matrix products in operators.py; element by element products (diagonal R) are not counted.

    Monarch: 2 k (a + b) a column for M x and for M^T g, and for the pull back once more M's inner half and both
    factors' gradients.
    """
    if isinstance(operator, Dense):
        once = 2 * operator.k**2 * columns
        return OperatorFlops(once, 2 * once)
    assert isinstance(operator, Monarch)
    padded, a = operator.a * operator.b, operator.a
    inner = 0 if operator.diagonal else operator.b
    once = 2 * padded * (a + inner) * columns
    return OperatorFlops(once, 2 * padded * (2 * a + 3 * inner) * columns)


def linear_weights(module: nn.Module) -> dict[str, int]:
    """Weights of every nn.Linear by path: each multiplies every token (a tied LM head counts, embeddings do not)."""
    return {name: m.weight.numel() for name, m in module.named_modules() if isinstance(m, nn.Linear)}


def attention_widths(model: PreTrainedModel) -> list[int]:
    """H (d_qk + d_v) of every layer."""
    config: Any = model.config.get_text_config()
    return [2 * own.num_attention_heads * _head_dim(own) for own in config.per_layer_config]


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def token_flops(
    model: PreTrainedModel, apex: Apex | None, length: int, other: "MethodFlops | None" = None
) -> tuple[TokenFlops, TokenFlops]:
    """Of one token in a row of `length`: of all decoder layers, and of the rest (the LM head).

    `apex`: built on `model`, or None where everything trains plainly. Recomputation (gradient checkpointing) is not
    counted: it is no work that the model needs.
    """
    path, _ = decoder_layers(model)
    weights = linear_weights(model)
    gradients = {name: size for name, size in weights.items() if model.get_submodule(name).weight.requires_grad}
    for name, (size, trains) in other.products.items() if other is not None else ():
        weights[name], gradients[name] = size, size if trains else 0
    gradients |= other.gradients if other is not None else {}
    routes = 0
    if apex is not None and apex.slices is not None:
        for matrix in (m for b in apex.anatomy.blocks for m in matrices_that_train(b, apex.budget.followers)):
            found = apex.slices.slice_of(matrix.module)
            if found is not None:
                gradients[matrix.module] = found.weight.numel()
        routes = sum(_route_flops(apex, tie) for tie in apex.ties if tie.by_tokens)
    reached = dict(weights)
    widths = attention_widths(model)
    attention, first_attention = sum(widths) * length, widths[0] * length
    skipped = 0
    if other is not None:
        skipped = other.saved * first_attention
        reached = {name: size for name, size in weights.items() if name not in other.unreached}
    elif not model.get_input_embeddings().weight.requires_grad:  # type: ignore[operator]
        # Nothing before the first layer trains, so its input needs no gradient; nor do its queries and keys, unless a
        # fused projection makes them together with the values.
        first = [b for b in apex.anatomy.blocks if b.kind == "heads" and b.layer == 0] if apex is not None else []
        for matrix in (m for b in first for m in (*b.mixed, *b.followers) if m.dim == 0):
            reached.pop(matrix.module, None)
        fused = any({m.module for m in b.mixed} & {m.module for m in b.followers} for b in first)
        skipped = 0 if fused else 3 * first_attention
    inside = f"{path}."
    return (
        TokenFlops(
            2 * _sum(weights, inside) + 2 * attention,
            2 * _sum(reached, inside) + 2 * _sum(gradients, inside) + 4 * attention - skipped + routes,
        ),
        TokenFlops(
            2 * _sum(weights, inside, outside=True),
            2 * _sum(reached, inside, outside=True) + 2 * _sum(gradients, inside, outside=True),
        ),
    )


def _sum(sizes: dict[str, int], prefix: str, outside: bool = False) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(prefix) is not outside)


def _route_flops(apex: Apex, tie: Tie) -> int:
    """A token's share in an operator whose gradient is read off token by token (slices.py): dM as a full matrix, and
    M^T for what trains of P."""
    trained = apex.budget.blocks[tie.block.name].p * tie.block.width
    return sum(2 * tie.k * (tie.k + trained) * matrix.slots for matrix in tie.matrices)


def pass_flops(apex: Apex | None) -> int:
    """Of the operators in one backward pass, whatever its tokens: dM of each matrix through M's factors."""
    total = 0
    for tie in apex.ties if apex is not None else []:
        if tie.by_tokens and isinstance(tie.operator, Monarch):
            total += len(tie.matrices) * 4 * (tie.operator.a * tie.operator.b) ** 2
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


@dataclass
class Held:
    """Bytes of a run's tensors, counted as if nothing were sharded, and what they are counted by."""

    layers: int
    vocabulary: int
    trainable: int
    """Parameters, operators included."""
    operator_parameters: int
    trained_by_size: dict[int, int]
    """Parameters that train, operators not included, by the bytes that one is held in."""
    element: int
    """Of one weight."""
    weights: int
    """Operators and slices not among them."""
    in_layers: int
    """Those of the decoder layers."""
    layer: int
    """Those of the largest layer."""
    biases: int
    """Those that fsdp2 leaves whole: of mixed rows."""
    operators: int
    slices: int
    """Of their weights; as float32 values, whatever the weights are held in."""
    slice_biases: int
    """Of their entries of biases, which fsdp2 leaves whole."""
    layer_slices: int
    """Those of the layer where they are most."""
    raw: int
    """Raw panels of N, and of P where diagonals change it, kept beside the effective weights."""
    panel: int
    """The largest of them, in the operators' dtype."""
    gradients: int
    """Of everything that trains, operators included."""
    own_gradients: int
    """Those of the model's own weights."""
    outside_gradients: int
    """Those of them outside the decoder layers."""
    layer_gradients: int
    """Those of the layer where they are most; 0 where slices train."""
    pulled: int
    """Those of operators that every process computes from the averaged gradients of weights."""
    largest: int
    """The largest tensor that trains."""
    embedding: int
    """The embedding, if it trains."""
    head: int
    """The LM head, if it trains."""
    working: int = 0
    """What another method holds in an optimizer step (Method.working_bytes)."""

    @property
    def outside(self) -> int:
        """Weights of embedding, last norm and LM head."""
        return self.weights - self.in_layers


def held_bytes(model: PreTrainedModel, apex: Apex | None) -> Held:
    """Of `model` with `apex` on it, or of one that trains plainly."""
    path, layers = decoder_layers(model)
    own = {n: p for n, p in model.named_parameters() if not n.startswith("apex.")}
    trained = [p for p in model.parameters() if p.requires_grad]
    embedding: Any = model.get_input_embeddings()
    ties = apex.ties if apex is not None else []
    panels = _panels(apex) if apex is not None else []
    slices = apex.slices.all() if apex is not None and apex.slices is not None else []
    of_operators = {id(p) for tie in ties for p in tie.parameters()}
    own_trained = {n: p.nbytes for n, p in own.items() if p.requires_grad}
    return Held(
        layers=len(layers),
        vocabulary=int(embedding.weight.shape[0]),
        trainable=apex.budget.trainable if apex is not None else sum(p.numel() for p in trained),
        operator_parameters=apex.operator_parameters if apex is not None else 0,
        trained_by_size=_by_size(p for p in trained if id(p) not in of_operators),
        element=next(iter(own.values())).element_size(),
        weights=sum(p.nbytes for p in own.values()),
        in_layers=sum(p.nbytes for n, p in own.items() if n.startswith(f"{path}.")),
        layer=max(map(weight_bytes, layers)),
        biases=sum(own[n].nbytes for n in _whole_biases(apex) if n in own) if apex is not None else 0,
        operators=sum(map(weight_bytes, ties)),
        slices=sum(found.weight.nbytes for found in slices),
        slice_biases=sum(found.bias.nbytes for found in slices if found.bias is not None),
        layer_slices=apex.slices.most_in_a_layer() if apex is not None and apex.slices is not None else 0,
        raw=sum(kept for kept, _ in panels),
        panel=max((wide for _, wide in panels), default=0),
        gradients=sum(p.nbytes for p in trained),
        own_gradients=sum(own_trained.values()),
        outside_gradients=sum(size for n, size in own_trained.items() if not n.startswith(f"{path}.")),
        layer_gradients=max(map(_trained_bytes, layers)),
        pulled=sum(weight_bytes(tie) for tie in ties if not tie.by_tokens),
        largest=max((p.nbytes for p in trained), default=0),
        embedding=_trained_bytes(embedding),
        head=_trained_bytes(model.get_output_embeddings()),
    )


def _by_size(parameters: Iterable[nn.Parameter]) -> dict[int, int]:
    found: dict[int, int] = {}
    for parameter in parameters:
        found[parameter.element_size()] = found.get(parameter.element_size(), 0) + parameter.numel()
    return found


def _whole_biases(apex: Apex) -> set[str]:
    """Names of biases that fsdp2 leaves whole, where a module has one."""
    blocks = apex.anatomy.blocks
    matrices = [m for block in blocks for m in matrices_that_train(block, apex.budget.followers)]
    return {f"{matrix.module}.bias" for matrix in matrices if matrix.dim == 0}


def _trained_bytes(module: nn.Module | None) -> int:
    return sum(p.nbytes for p in module.parameters() if p.requires_grad) if module is not None else 0


def _panels(apex: Apex) -> list[tuple[int, int]]:
    """Of each tensor that is mixed: bytes of its raw panels, and of one panel in the operators' dtype."""
    found = []
    for tie in apex.ties:
        for piece in tie.pieces:
            weight = apex.model.get_parameter(piece.name)
            panels = 1 if tie.scale_of(piece)[1] is None else 2
            other = weight.shape[1 - piece.dim] if weight.dim() == 2 else 1
            values = tie.k * piece.matrix.slots * other
            kept = tie.dtype.itemsize if apex.slices is not None else weight.element_size()
            found.append((panels * values * kept, values * tie.dtype.itemsize))
    return found


def weight_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def sent_bytes(held: Held, layout: Layout, *, bf16: bool, micro_batches: int) -> dict[str, int]:
    """What each process sends in an optimizer step, by what it is for; as in a ring: (n - 1) / n of a tensor that is
    gathered or scattered, twice that where it is summed for all. A few bytes (loss, norm) left out."""
    part = (layout.processes - 1) / layout.processes
    if layout.strategy == "ddp":
        by_tokens = held.operators - held.pulled
        return {
            "gradients averaged": round(2 * part * (held.gradients - held.operators)),
            "of operators": round(2 * part * by_tokens),
        }
    if layout.strategy == "fsdp2":
        sharded = held.weights - held.biases
        gathered = (sharded + held.in_layers - held.biases) * gathered_share(held, bf16)
        biases = held.slice_biases if held.slices else held.biases
        own = (held.own_gradients - (0 if held.slices else held.biases)) * reduced_share(held, bf16)
        return {
            "weights gathered": round(part * micro_batches * gathered),
            "gradients scattered": round(part * micro_batches * (own + held.slices)),
            "biases' gradients": round(2 * part * biases),
            "of operators": round(2 * part * held.operators),
        }
    return {}


def gathered_share(held: Held, bf16: bool) -> float:
    """Bytes of a weight as fsdp2 gathers it, of those it is held in."""
    return torch.bfloat16.itemsize / held.element if bf16 else 1.0


def reduced_share(held: Held, bf16: bool) -> float:
    """Bytes of a weight's gradient as fsdp2 sums it, of those the weight is held in."""
    return torch.float32.itemsize / held.element if bf16 else 1.0


def trained_in_layers(apex: Apex, layers: Collection[int]) -> int:
    """Parameters of operators and slices in the decoder layers `layers`."""
    operators = sum(p.numel() for tie in apex.ties if tie.block.layer in layers for p in tie.parameters())
    slices = 0
    for block in apex.anatomy.blocks:
        if block.layer in layers and block.name in apex.budget.blocks:
            counts = apex.budget.blocks[block.name]
            picked = counts.n + counts.p + counts.rest
            slices += picked * component_size(apex.model, block, apex.budget.followers)
    return operators + slices
