"""The tensors of a GGUF file, each made only when it is written."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftlm.anatomy import Block, Matrix, linear, read_anatomy
from graftlm.export.facts import Facts
from graftlm.export.targets import Target
from graftlm.pruning.per_layer_modeling import output_biases
from graftlm.pruning.shapes import LayerShape

NAMES = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
NAMES |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}


@dataclass(frozen=True)
class Piece:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def written_shapes(facts: Facts, target: Target, quantum: int) -> list[LayerShape]:
    """The layers as the file has them: what is empty and the target cannot leave out is there, full of zeros.

    `quantum`: the least width that the file's number format takes.
    """
    shapes = []
    for i, shape in enumerate(facts.shapes):
        heads, groups = shape.num_attention_heads, shape.num_key_value_heads
        # llama.cpp takes the width of a head for zero when the first layer has none
        if not heads and (i == 0 or "qkv" in target.fused or i in facts.bias_only):
            heads = groups = quantum // math.gcd(quantum, facts.head_dim)
        # llama.cpp's deci has layers without channels, and drops the attention of such a layer
        shapes.append(LayerShape(heads, groups, shape.intermediate_size or quantum, shape.output_biases))
    return shapes


def pieces(model: PreTrainedModel, facts: Facts, target: Target, quantum: int) -> list[Piece]:
    """All tensors of `model` for `target`, in the order of the file."""
    embedding = cast(Any, model.get_input_embeddings())
    output = cast(Any, model.get_output_embeddings())
    found = [_plain("token_embd.weight", embedding.weight)]
    if target.tied is False or not facts.tied:
        found.append(_plain("output.weight", output.weight))
    found.append(_plain("output_norm.weight", cast(Any, model.get_decoder()).norm.weight, target.norm_offset))
    found += _rope_pieces(facts)
    blocks = {(block.layer, block.kind): block for block in read_anatomy(model, smallest=1).blocks}
    for i, shape in enumerate(written_shapes(facts, target, quantum)):
        layer = model.get_submodule(f"{facts.layers_at}.{i}")
        for theirs, ours in target.norms:
            if shape.num_attention_heads or ours != "attn_norm":
                norm = cast(Any, layer.get_submodule(theirs))
                found.append(_plain(f"blk.{i}.{ours}.weight", norm.weight, target.norm_offset))
        if shape.num_attention_heads:
            found += _attention(model, blocks.get((i, "heads")), i, shape, facts, target)
        found += _feed_forward(model, blocks.get((i, "channels")), i, shape, facts, target)
        # Also of what is empty, where they are all that is added.
        for name, bias in zip(("attn_output", "ffn_down"), output_biases(layer), strict=True):
            if bias is not None:
                found.append(_plain(f"blk.{i}.{name}.bias", bias))
    return found


def _plain(name: str, weight: Tensor, offset: float = 0.0) -> Piece:
    return Piece(name, tuple(weight.shape), lambda: weight.detach().float() + offset if offset else weight.detach())


def _rope_pieces(facts: Facts) -> Iterator[Piece]:
    rope = facts.rope
    if rope.kind == "llama3":
        plain = rope.theta ** -(torch.arange(0, rope.dimensions, 2) / rope.dimensions)
        yield Piece("rope_freqs.weight", (rope.dimensions // 2,), lambda: plain / rope.frequencies)
    if rope.kind == "longrope":
        for name in ("long", "short"):
            factors = torch.tensor(rope.parameters[f"{name}_factor"])
            yield _plain(f"rope_factors_{name}.weight", factors)


def _attention(
    model: PreTrainedModel, block: Block | None, i: int, shape: LayerShape, facts: Facts, target: Target
) -> Iterator[Piece]:
    d, width = facts.hidden, facts.head_dim
    sizes = {"q": shape.num_attention_heads, "k": shape.num_key_value_heads, "v": shape.num_key_value_heads}
    if block is None:  # no attention, and a target that cannot leave it out
        rows = {role: _zeros((count * width, d)) for role, count in sizes.items()}
        biases: dict[str, Callable[[], Tensor]] = {}
        output = _zeros((d, sizes["q"] * width))
        norms = {"q": _zeros((width,)), "k": _zeros((width,))} if target.query_norm else {}
    else:
        parts = {m.role: m for m in (*block.mixed, *block.followers)}
        scale = _query_scale(facts, target)
        rows, biases = {}, {}
        for role in ("q", "k", "v"):
            how: Any = {"interleave": target.interleaved and role != "v"}
            how["factor"] = scale if role == "q" and not target.query_norm else 1.0
            rows[role] = _rows(model, block, parts[role], **how)
            if linear(model, parts[role].module).bias is not None:
                biases[role] = _rows(model, block, parts[role], "bias", **how)
        output = _whole(linear(model, parts["o"].module).weight)
        norms = {}
        attention = cast(Any, model.get_submodule(f"{facts.layers_at}.{i}")).self_attn
        if target.query_norm:
            norms = {
                role: _scaled(getattr(attention, f"{role}_norm").weight, scale if role == "q" else 1.0) for role in "qk"
            }
    if "qkv" in target.fused:
        heads = sum(sizes.values())
        yield Piece(f"blk.{i}.attn_qkv.weight", (heads * width, d), lambda: torch.cat([rows[r]() for r in "qkv"]))
    else:
        for role, count in sizes.items():
            yield Piece(f"blk.{i}.{NAMES[role]}.weight", (count * width, d), rows[role])
            if role in biases:
                yield Piece(f"blk.{i}.{NAMES[role]}.bias", (count * width,), biases[role])
    for role, make in norms.items():
        count = {"head": 1, "all": sizes[role]}[target.query_norm or "head"]
        yield Piece(f"blk.{i}.attn_{role}_norm.weight", (count * width,), make)
    yield Piece(f"blk.{i}.attn_output.weight", (d, sizes["q"] * width), output)


def _feed_forward(
    model: PreTrainedModel, block: Block | None, i: int, shape: LayerShape, facts: Facts, target: Target
) -> Iterator[Piece]:
    d, channels = facts.hidden, shape.intermediate_size
    if block is None:
        rows = {"gate": _zeros((channels, d)), "up": _zeros((channels, d))}
        output = _zeros((d, channels))
    else:
        parts = {m.role: m for m in block.mixed}
        rows = {role: _rows(model, block, parts[role]) for role in ("gate", "up")}
        output = _whole(linear(model, parts["down"].module).weight)
        for role in ("gate", "up"):
            if linear(model, parts[role].module).bias is not None:
                yield Piece(f"blk.{i}.{NAMES[role]}.bias", (channels,), _rows(model, block, parts[role], "bias"))
    if "gate_up" in target.fused:
        yield Piece(f"blk.{i}.ffn_up.weight", (2 * channels, d), lambda: torch.cat([rows["gate"](), rows["up"]()]))
    else:
        for role in ("gate", "up"):
            yield Piece(f"blk.{i}.{NAMES[role]}.weight", (channels, d), rows[role])
    yield Piece(f"blk.{i}.ffn_down.weight", (d, channels), output)


def _query_scale(facts: Facts, target: Target) -> float:
    """What queries are multiplied by, so that llama.cpp's own scale of the scores becomes the model's."""
    theirs = facts.head_dim**-0.5
    if target.name == "gemma2" and len(facts.shapes) == 46:  # the 27B: known to llama.cpp by its layers
        theirs = (facts.hidden // facts.shapes[0].num_attention_heads) ** -0.5
    return 1.0 if facts.scale is None or math.isclose(facts.scale, theirs) else facts.scale / theirs


def _zeros(shape: tuple[int, ...]) -> Callable[[], Tensor]:
    return lambda: torch.zeros(shape)


def _whole(weight: Tensor) -> Callable[[], Tensor]:
    return lambda: weight.detach()


def _scaled(weight: Tensor, factor: float) -> Callable[[], Tensor]:
    return lambda: weight.detach() * factor


def _rows(
    model: PreTrainedModel,
    block: Block,
    part: Matrix,
    parameter: str = "weight",
    *,
    interleave: bool = False,
    factor: float = 1.0,
) -> Callable[[], Tensor]:
    """Of all components of one part, in its own order: [n, d], or [n] of a bias.

    `interleave`: the two halves of a head's dimensions take turns, as an architecture has them that rotates
    neighbours: dimension e of the first half comes to 2e, of the second to 2e + 1.
    """

    def make() -> Tensor:
        rows = part.index(torch.arange(block.components)).flatten().sort().values
        if interleave:
            rows = rows.view(-1, 2, part.width // 2).transpose(1, 2).flatten()
        whole = getattr(linear(model, part.module), parameter).detach()
        taken = whole[rows.to(whole.device)]
        return taken if factor == 1.0 else taken.float() * factor

    return make
