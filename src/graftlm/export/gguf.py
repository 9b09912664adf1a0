"""A model as a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), which llama.cpp runs."""

import glob
import importlib.metadata
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, quants
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftlm.anatomy import model_family
from graftlm.errors import UserError
from graftlm.export.facts import Facts, read_facts
from graftlm.export.targets import Target, check_family, choose_target
from graftlm.export.tensors import Piece, pieces, written_shapes
from graftlm.export.vocabulary import name_in_file, write_vocabulary
from graftlm.files import atomic_path, remove_unfinished

KINDS = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""Number formats: of matrices; vectors (norms, biases) stay float32, as llama.cpp has it."""

Q8_BLOCK = 32
"""Numbers that share a scale in q8_0: every matrix is a multiple of it wide."""


@dataclass(frozen=True)
class Written:
    """A GGUF file and what is in it."""

    path: Path
    architecture: str
    kind: str
    tensors: int
    size: int
    """Bytes."""
    notes: tuple[str, ...]
    """What a user should know."""


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    kind: str | None = None,
    name: str | None = None,
    licence: str | None = None,
    heard: Callable[[int, int], None] = lambda done, tensors: None,
    inspect: Callable[[Path], None] = lambda file: None,
) -> Written:
    """Write `model` and `tokenizer` as `path`, all of it or nothing, one tensor in memory at a time.

    Args:
        model: of any stock family in anatomy.FAMILIES, or pruned, on any device.
        kind: f32, f16, bf16 or q8_0; None: as the weights are held.
        name: of the model, for the file's metadata (default: the file's).
        heard: called after every tensor with how many are written, and how many there are.
        inspect: called with the finished file before it takes its place; what it raises leaves nothing behind.

    Raises UserError when no architecture of llama.cpp holds the model, for widths that q8_0 refuses, and for a
    tokenizer that GGUF cannot hold.
    """
    path = Path(path)
    kind = kind or {torch.bfloat16: "bf16", torch.float16: "f16"}.get(model.dtype, "f32")
    check_kind(kind)
    check_family(model_family(model))
    facts = read_facts(model)
    target = choose_target(facts)
    quantum = Q8_BLOCK if kind == "q8_0" else 1
    found = pieces(model, facts, target, quantum)
    if kind == "q8_0":
        _check_blocks(found, facts)
    writer = GGUFWriter(None, target.name)
    title = name_in_file(name or path.stem, tokenizer)
    notes = _write_metadata(writer, facts, target, quantum, kind, _size_label(model), title, licence)
    notes += write_vocabulary(writer, tokenizer, facts.rows).notes
    for piece in found:
        own = _kind_of(piece, kind)
        shape = quants.quant_shape_to_byte_shape(piece.shape, own)
        numbers, taken = GGML_QUANT_SIZES[own]
        size = math.prod(piece.shape) // numbers * taken
        raw = own in (GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0)
        dtype = np.dtype(np.uint8 if raw else np.float16 if own == GGMLQuantizationType.F16 else np.float32)
        writer.add_tensor_info(piece.name, shape if raw else piece.shape, dtype, size, own if raw else None)
    remove_unfinished(path.parent, glob.escape(path.name))  # of an export that was killed
    with atomic_path(path) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for i, piece in enumerate(found):
                writer.write_tensor_data(packed(piece.make(), _kind_of(piece, kind)))
                heard(i + 1, len(found))
        finally:
            writer.close()
        inspect(temporary)
    return Written(path, target.name, kind, len(found), path.stat().st_size, notes)


def packed(tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """`tensor` [..., n] in a number format of GGUF: float32, float16, or bytes [..., m]."""
    return np.ascontiguousarray(quants.quantize(tensor.detach().float().cpu().numpy(), kind))


def _kind_of(piece: Piece, kind: str) -> GGMLQuantizationType:
    return KINDS[kind][0] if len(piece.shape) > 1 else GGMLQuantizationType.F32


def check_kind(kind: str) -> None:
    """Raise UserError for a number format that is not written here."""
    if kind not in KINDS:
        raise UserError(f"export: quantize: {kind} is not one of {', '.join(KINDS)}{_k_quants(kind)}")


def _k_quants(kind: str) -> str:
    if re.fullmatch(r"(i?q[1-6])_\w+", kind.lower()):
        return (
            "; make the others from an f16 or f32 file with llama.cpp's llama-quantize (its K-quants need widths that "
            "are multiples of 256: graftlm prune --width-multiple 256)"
        )
    return ""


def _check_blocks(found: list[Piece], facts: Facts) -> None:
    """Raises UserError where a matrix is no multiple of q8_0's block wide, with what to ask for."""
    for piece in found:
        width = piece.shape[-1]
        if len(piece.shape) == 1 or width % Q8_BLOCK == 0:
            continue
        if "ffn_down" in piece.name:
            advice = f"prune again with `graftlm prune --width-multiple {Q8_BLOCK}`, or take --quantize f16"
            raise UserError(
                f"export: q8_0 needs widths that are multiples of {Q8_BLOCK}; {piece.name} has {width}; {advice}"
            )
        what = f"the hidden size is {width}"
        if "attn_output" in piece.name:
            what = f"{piece.name}: {width // facts.head_dim} heads of {facts.head_dim} are {width} wide"
        raise UserError(f"export: q8_0 needs widths that are multiples of {Q8_BLOCK}; {what}; take --quantize f16")


def _write_metadata(
    writer: GGUFWriter,
    facts: Facts,
    target: Target,
    quantum: int,
    kind: str,
    size_label: str,
    name: str,
    licence: str | None,
) -> tuple[str, ...]:
    shapes = written_shapes(facts, target, quantum)
    notes = []
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(size_label)
    if licence:
        writer.add_license(licence)
    writer.add_quantized_by(f"graftlm {importlib.metadata.version('graftlm')}")
    writer.add_file_type(KINDS[kind][1])
    writer.add_quantization_version(2)
    writer.add_string("graftlm.model_type", facts.config.model_type)
    writer.add_string("graftlm.layers", json.dumps([asdict(shape) for shape in facts.shapes]))
    context = facts.context
    if facts.window and not target.window and facts.window < context:
        context = facts.window
        notes.append(
            f"{target.name} has no sliding attention: the file says {context} tokens of context, up to which it "
            f"computes what the model does (the model's own: {facts.context})"
        )
    writer.add_context_length(context)
    writer.add_vocab_size(facts.rows)
    writer.add_embedding_length(facts.hidden)
    writer.add_block_count(len(shapes))
    writer.add_head_count(_value([s.num_attention_heads for s in shapes], target))
    writer.add_head_count_kv(_value([s.num_key_value_heads for s in shapes], target))
    writer.add_feed_forward_length(_value([s.intermediate_size for s in shapes], target))
    writer.add_key_length(facts.head_dim)
    writer.add_value_length(facts.head_dim)
    writer.add_layer_norm_rms_eps(facts.epsilon)
    _write_rope(writer, facts)
    if target.window:
        writer.add_sliding_window(facts.window or facts.context)
        if not facts.config.attn_logit_softcapping or not facts.config.final_logit_softcapping:
            raise UserError(
                f"export: {target.name} caps its logits, this model does not; transformers opens it as it is"
            )
        writer.add_attn_logit_softcapping(facts.config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(facts.config.final_logit_softcapping)
    return tuple(notes)


def _value(counts: list[int], target: Target) -> Any:
    return counts if target.per_layer else counts[0]


def _write_rope(writer: GGUFWriter, facts: Facts) -> None:
    rope = facts.rope
    given = rope.parameters
    writer.add_rope_dimension_count(rope.dimensions)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if rope.kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(given["factor"])
    if rope.kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(given["original_max_position_embeddings"])
    if rope.kind == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(float(given.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(given.get("beta_slow") or 1))
        usual = 0.1 * math.log(given["factor"]) + 1.0  # llama.cpp's own, times what the file says
        writer.add_rope_scaling_attn_factors(rope.amplitude / usual)
    if rope.kind == "longrope":
        writer.add_rope_scaling_attn_factors(rope.amplitude)


def _size_label(model: PreTrainedModel) -> str:
    count = model.num_parameters()
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
