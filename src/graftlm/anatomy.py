"""Where heads and channels live in a model: the only file that knows a model family's names.

Shapes: d = hidden size, H = query heads, G = key-value groups, D = head_dim, F = FFN width. nn.Linear stores [out, in].
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftlm.errors import UserError

Kind = Literal["heads", "channels"]
KINDS: tuple[Kind, ...] = ("heads", "channels")


@dataclass(frozen=True)
class AttentionNames:
    """Paths inside a decoder layer. A fused projection lists its parts in the order of its rows."""

    queries: str
    keys: str
    values: str
    output: str
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    norms_over_all: bool | None = None
    """Those norms are over all heads at once, whose weights go with the heads (OLMo2), not over each (Qwen3). None: as
    their lengths say, which do not tell the two apart where a layer has one head."""


@dataclass(frozen=True)
class FeedForwardNames:
    """Paths inside a decoder layer; `gate` and `up` may be the same module (rows of gate first)."""

    gate: str
    up: str
    down: str
    activation: str


SPLIT_ATTENTION = AttentionNames("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FUSED_ATTENTION = AttentionNames("self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.o_proj")
SPLIT_FEED_FORWARD = FeedForwardNames("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn")
FUSED_FEED_FORWARD = FeedForwardNames("mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj", "mlp.activation_fn")

PER_LAYER = "per_layer_"
"""Model types of pruned models, whose layers differ, are their family's after this (pruning/per_layer_modeling.py)."""
SLICED = "sliced_"
"""The same of models with a sliced hidden size (pruning/sliced_modeling.py), whose layers are of no stock shape."""

# model_type -> names. Families in the first line share Llama's layout; Qwen2 adds biases, Qwen3 and OLMo2 norms on
# queries and keys, Gemma another activation: none of these changes where heads and channels live.
SPLIT = (SPLIT_ATTENTION, SPLIT_FEED_FORWARD)
FAMILIES: dict[str, tuple[AttentionNames, FeedForwardNames]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "smollm3"), SPLIT),
    "olmo2": (replace(SPLIT_ATTENTION, norms_over_all=True), SPLIT_FEED_FORWARD),
    "phi3": (FUSED_ATTENTION, FUSED_FEED_FORWARD),
}

HEADS_OF_THEIR_OWN = ("diffllama",)
"""Families of the shapes that FAMILIES have, but whose heads take values from more than one key-value group."""


@dataclass(frozen=True)
class Matrix:
    """The part of one nn.Linear that belongs to a block's components.

    Component c, slot r, dimension e lies at index `offset + (c * slots + r) * width + e` of dimension `dim`
    (0: rows, i.e. outputs; 1: columns, i.e. inputs). Slots are the query heads of a key-value group (1 elsewhere).
    """

    module: str
    role: Literal["q", "k", "v", "o", "gate", "up", "down", "q_norm", "k_norm"]
    dim: int
    slots: int
    width: int
    offset: int = 0

    def index(self, components: Tensor) -> Tensor:
        """Positions of `components` [n] along `dim`: int64 [slots, n * width]."""
        device = components.device
        slot = torch.arange(self.slots, device=device)[:, None, None]
        within = torch.arange(self.width, device=device)
        # [slots, n, width]
        return (self.offset + (components[:, None] * self.slots + slot) * self.width + within).flatten(1)


@dataclass(frozen=True)
class Block:
    """One module whose components are ranked: the heads of a layer's attention, or the channels of its FFN.

    `components` counts what P and N are made of (key-value groups, channels); `ranked` what is ranked (query heads,
    channels): `ranked = components * slots`. `mixed` are the matrices that expansion changes, `followers` those that
    belong to the same components but are not mixed (queries and keys).
    """

    kind: Kind
    layer: int
    components: int
    ranked: int
    width: int
    mixed: tuple[Matrix, ...]
    followers: tuple[Matrix, ...]
    probe: str
    """Module at which activations are seen: the input of the output projection, or the output of the activation."""
    gate: str | None = None
    """Channels: the module that computes the gate, used when the activation module is never called."""
    feed_forward: str | None = None
    """Channels: the module that computes down(activation(gate(x)) * up(x)) and nothing else; None where it may not."""
    norms: tuple[Matrix, ...] = ()
    """Heads: norms over the queries or keys of all heads at once, whose weights [n] lie by head (OLMo2)."""

    @property
    def name(self) -> str:
        return f"layer{self.layer}_{self.kind}"

    @property
    def output(self) -> Matrix:
        """The projection that returns to the residual stream. Its columns lie component by component:
        [components, slots * width]."""
        return next(matrix for matrix in self.mixed if matrix.dim == 1)

    @property
    def slots(self) -> int:
        """Ranked units per component."""
        return self.ranked // self.components

    def units(self, components: Tensor) -> Tensor:
        """What is ranked of `components` [n]: int64 [n * slots]."""
        return (components[:, None] * self.slots + torch.arange(self.slots, device=components.device)).flatten()


@dataclass(frozen=True)
class Anatomy:
    """All blocks of a model that can be expanded, and a word on what cannot."""

    blocks: tuple[Block, ...]
    layers: int
    notes: tuple[str, ...]

    def of_kind(self, kind: Kind) -> Iterator[Block]:
        return (block for block in self.blocks if block.kind == kind)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(kind for kind in KINDS if any(block.kind == kind for block in self.blocks))


def linear(model: nn.Module, name: str) -> nn.Linear:
    """The nn.Linear called `name` (KeyError-free: looked up by path each time, since wrappers replace parameters)."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise UserError(f"{name} is a {kind}, not nn.Linear; expansion needs plain, unquantised linear layers")
    if module.weight.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise UserError(
            f"{name} holds {module.weight.dtype}, which is quantised; load the model in bfloat16 or float32"
        )
    return module


def _weight(model: nn.Module, path: str) -> Tensor | None:
    return cast(Tensor | None, getattr(model.get_submodule(path), "weight", None))


def _has(layer: nn.Module, path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


def _fits(layers: nn.ModuleList, *paths: str) -> bool:
    """Whether any layer has all of `paths`: in a mixture of experts, only some layers may have one FFN."""
    return any(all(_has(layer, path) for path in paths) for layer in layers)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers: the longest ModuleList of the model's text decoder."""
    decoder: Any = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    found = [(name, m) for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and "." not in name]
    if not found:
        raise UserError(f"{type(model).__name__} has no list of decoder layers; only decoder-only language models fit")
    name, layers = max(found, key=lambda item: len(item[1]))
    prefix = next(n for n, m in model.named_modules() if m is decoder)
    return f"{prefix}.{name}" if prefix else name, layers


def decoder_linears(model: nn.Module) -> list[str]:
    """Paths of every nn.Linear of the decoder layers that has weights (a pruned layer may have lost all)."""
    path, layers = decoder_layers(model)
    found = ((name, module) for name, module in layers.named_modules() if isinstance(module, nn.Linear))
    return [f"{path}.{name}" for name, module in found if module.weight.numel()]


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_per_layer(config: Any) -> bool:
    """Whether a config is of a class whose layers may differ (pruning/per_layer_modeling.py)."""
    return str(getattr(config, "model_type", "")).startswith(PER_LAYER)


def model_family(model: nn.Module) -> str:
    """Model type of the stock family that `model` is of, also where it was pruned; empty where it has none."""
    return getattr(_text_config(model), "model_type", "").removeprefix(PER_LAYER)


def _head_dim(model: nn.Module, output: nn.Linear) -> int:
    """Width of a head; `output`: a layer's output projection."""
    config = _text_config(model)
    return int(getattr(config, "head_dim", None) or output.in_features // config.num_attention_heads)


def _norms_over_all(model: nn.Module, layers: nn.ModuleList, names: AttentionNames) -> bool:
    """Whether any layer's norm of queries or keys is longer than a head."""
    for layer in layers:
        for path in (names.query_norm, names.key_norm):
            weight = _weight(layer, path) if _has(layer, path) and _has(layer, names.output) else None
            if weight is not None and len(weight) > _head_dim(model, linear(layer, names.output)):
                return True
    return False


def _attention_block(model: nn.Module, layer: int, prefix: str, names: AttentionNames, smallest: int) -> Block | str:
    """The heads of one layer, or a word on why they cannot be expanded."""
    output = linear(model, f"{prefix}.{names.output}")
    head_dim = _head_dim(model, output)
    query_heads = output.in_features // head_dim  # a pruned layer has fewer than the config says
    values = linear(model, f"{prefix}.{names.values}")
    if names.values == names.queries:  # fused: rows of q, then k, then v
        groups = (values.out_features // head_dim - query_heads) // 2
        key_offset, value_offset = query_heads * head_dim, (query_heads + groups) * head_dim
    else:
        groups, key_offset, value_offset = values.out_features // head_dim, 0, 0
    if groups < smallest:
        return "heads: one key-value head, so there is no P and N to choose (only the FFN is expanded)"
    if not _heads_fit(model, prefix, names, query_heads, groups, head_dim):
        return "heads: queries, keys and values of a family of its own, so which belong together is not known"
    slots = query_heads // groups
    norms = []
    for role, path, count in (("q_norm", names.query_norm, slots), ("k_norm", names.key_norm, 1)):
        there = names.norms_over_all and _has(model, f"{prefix}.{path}")
        if there and _weight(model, f"{prefix}.{path}") is not None:
            norms.append(Matrix(f"{prefix}.{path}", role, 0, count, head_dim))  # type: ignore[arg-type]
    return Block(
        kind="heads",
        layer=layer,
        components=groups,
        ranked=query_heads,
        width=head_dim,
        mixed=(
            Matrix(f"{prefix}.{names.values}", "v", 0, 1, head_dim, value_offset),
            Matrix(f"{prefix}.{names.output}", "o", 1, slots, head_dim),
        ),
        followers=(
            Matrix(f"{prefix}.{names.queries}", "q", 0, slots, head_dim),
            Matrix(f"{prefix}.{names.keys}", "k", 0, 1, head_dim, key_offset),
        ),
        probe=f"{prefix}.{names.output}",
        norms=tuple(norms),
    )


def _heads_fit(
    model: nn.Module, prefix: str, names: AttentionNames, query_heads: int, groups: int, head_dim: int
) -> bool:
    """Whether the projections are of so many heads and groups: a family that is recognised by its layers' names may
    have a gate beside its queries, say, or mix heads of two groups."""
    outputs = {
        path: linear(model, f"{prefix}.{path}").out_features for path in (names.queries, names.keys, names.values)
    }
    if names.values == names.queries:
        expected = {names.queries: (query_heads + 2 * groups) * head_dim}
    else:
        expected = {names.queries: query_heads * head_dim} | dict.fromkeys(
            (names.keys, names.values), groups * head_dim
        )
    return outputs == expected and query_heads % groups == 0 and model_family(model) not in HEADS_OF_THEIR_OWN


def _feed_forward_block(model: nn.Module, layer: int, prefix: str, names: FeedForwardNames, known: bool) -> Block:
    channels = linear(model, f"{prefix}.{names.down}").in_features
    fused = names.gate == names.up
    return Block(
        kind="channels",
        layer=layer,
        components=channels,
        ranked=channels,
        width=1,
        mixed=(
            Matrix(f"{prefix}.{names.up}", "up", 0, 1, 1, channels if fused else 0),
            Matrix(f"{prefix}.{names.gate}", "gate", 0, 1, 1),
            Matrix(f"{prefix}.{names.down}", "down", 1, 1, 1),
        ),
        followers=(),
        probe=f"{prefix}.{names.activation}",
        gate=f"{prefix}.{names.gate}",
        feed_forward=f"{prefix}.{names.gate}".rpartition(".")[0] if known and not fused else None,
    )


def _why_no_feed_forward(layer: nn.Module) -> str:
    if any("expert" in name for name, _ in layer.named_modules()):
        return "channels: a mixture of experts has no single set of channels to rank (only heads are expanded)"
    return "channels: the FFN has no gate (up, gate and down projections) that this method ranks by"


def _layout(
    model: nn.Module, layers: nn.ModuleList
) -> tuple[AttentionNames | None, FeedForwardNames | None, list[str]]:
    model_type = model_family(model)
    if model_type in FAMILIES:
        return *FAMILIES[model_type], []
    attention = next((n for n in (SPLIT_ATTENTION, FUSED_ATTENTION) if _fits(layers, n.values, n.output)), None)
    feed_forward = next((n for n in (SPLIT_FEED_FORWARD, FUSED_FEED_FORWARD) if _fits(layers, n.gate, n.down)), None)
    return (
        attention,
        feed_forward,
        [
            f"{model_type or type(model).__name__} is not in the table of families; "
            "its layers were recognised by their names, and no test covers it"
        ],
    )


def read_anatomy(model: nn.Module, *, smallest: int = 2) -> Anatomy:
    """Find every block of `model` that can be expanded.

    `smallest`: key-value groups, and channels, that a layer needs to count: 2 to choose P and N among them, 1 to prune.
    Raises UserError when nothing can; `notes` says what cannot, once for each reason. Only a pruned model that has
    lost every component has no blocks, where one group would do.
    """
    path, layers = decoder_layers(model)
    attention, feed_forward, notes = _layout(model, layers)
    if attention is not None and attention.norms_over_all is None:
        attention = replace(attention, norms_over_all=_norms_over_all(model, layers, attention))
    blocks: list[Block] = []
    why: list[str] = []  # of each layer that lacks a block
    for i, layer in enumerate(layers):
        prefix = f"{path}.{i}"
        if attention is not None and _has(layer, attention.values) and _has(layer, attention.output):
            block = _attention_block(model, i, prefix, attention, smallest)
            if isinstance(block, Block):
                blocks.append(block)
            else:
                why.append(block)
        elif is_per_layer(_text_config(model)):
            why.append("heads: pruned away")
        else:
            why.append("heads: no value and output projections of a known name")
        if feed_forward is not None and _has(layer, feed_forward.gate) and _has(layer, feed_forward.down):
            known = model_family(model) in FAMILIES
            channels = _feed_forward_block(model, i, prefix, feed_forward, known)
            if channels.components >= smallest:
                blocks.append(channels)
            elif channels.components:
                why.append("channels: one channel, so there is no P and N to choose")
        elif is_per_layer(_text_config(model)):
            why.append("channels: pruned away")
        else:
            why.append(_why_no_feed_forward(layer))
    for reason, count in Counter(why).items():
        notes.append(reason if count == len(layers) else f"{reason}; in {count} of {len(layers)} layers")
    if not blocks and (smallest > 1 or not is_per_layer(_text_config(model))):
        raise UserError(f"{type(model).__name__} cannot be expanded: {'; '.join(notes)}")
    return Anatomy(tuple(blocks), len(layers), tuple(notes))
