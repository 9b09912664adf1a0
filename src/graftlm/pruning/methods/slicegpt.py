"""SliceGPT: rotate the residual stream, then cut its last dimensions off (Ashkboos et al. 2024, arXiv 2401.15024).

RMSNorm's weights go into the matrices behind it (section 3.2). The norm then commutes with rotations, so each half of a
layer may have a basis of its own: the principal components of what enters it (section 3.3), found one after the other
with what comes before already sliced. The rotations are absorbed by the matrices; between the bases of two blocks the
residual stream is multiplied with Q_l^T Q_(l+1). Slicing (section 3.4) keeps the first dimensions of each.

We differ from the authors' code (microsoft/TransformerCompression): the rows of the output head are sliced like
everything else (theirs keeps the last basis whole unless `do_slice_head`), the width is not rounded to a multiple of 8,
and padding does not count. Heads and channels stay as they are.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from graftlm.activations import MODEL_INPUTS, no_logits
from graftlm.anatomy import SLICED, decoder_layers, linear
from graftlm.errors import UserError
from graftlm.modes import evaluating
from graftlm.parts import count_parameters
from graftlm.pruning.base import Batch, Calibration, Pruned, PruneStep
from graftlm.pruning.one_step import Before, kept_as_published, pruned_from
from graftlm.pruning.prune import check_finite
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.sliced_modeling import FAMILIES, NORMS
from graftlm.pruning.surgery import prunable_blocks, rebuilt
from graftlm.pruning.targets import asked_parameters

MANY = 20
"""Calibration tokens for each dimension, below which a note asks for more."""

AT_ONCE = 2**27
"""Values of a matrix that are held in float64 at a time."""
SHORTCUTS = ("attention_shortcut", "feed_forward_shortcut")


@torch.no_grad()
def prune(
    model: PreTrainedModel, settings: PruneSettings, calibration: Calibration, heard: Callable[[PruneStep], None]
) -> Pruned:
    """Slice the hidden size so that the target is met: the widest model that is not above it, rotations included.
    With `exact: false`, as published: the sparsity is the share of the hidden size that goes.

    Raises UserError for a target that a hidden size of 1 misses.
    """
    before, wanted = Before.of(model), asked_parameters(model, settings)
    kept = {block.name: torch.arange(block.components) for block in prunable_blocks(model)}
    batches = calibration(0)
    wide = folded(model)
    size = wide.config.hidden_size
    width = kept_as_published(size, settings) or _width(wide.config, wanted)
    with evaluating(wide):
        absorb_rotations(wide, batches, width)
    sliced = rebuilt(wide, _sliced_config(wide.config, width), lambda _, tensor: tensor)
    more = parameters_at(sliced.config, width + 1) - count_parameters(sliced)
    notes = [
        f"slicegpt: hidden size {size} -> {width} ({1 - width / size:.1%} sliced), with {2 * len(before.shapes)} "
        f"rotations between the blocks, and embeddings and output head no longer tied; a dimension is {more:,} "
        "parameters"
    ]
    tokens = sum(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in batches)
    if tokens < MANY * size:
        notes.append(
            f"slicegpt: {tokens} calibration tokens are few to find {size} directions by (its authors give 262,144); "
            "give more samples, or longer ones"
        )
    return pruned_from(before, sliced, settings, kept, heard, notes=tuple(notes))


def folded(model: PreTrainedModel) -> PreTrainedModel:
    """The same function in the sliced family's class, at full width: norm weights folded into the matrices behind them,
    embeddings and head untied, identities between the blocks. `model` is used up."""
    path, layers = decoder_layers(model)
    for layer in layers:
        for shortcut in SHORTCUTS:
            eye = torch.eye(model.config.hidden_size, dtype=model.dtype, device=next(layer.parameters()).device)
            layer.register_parameter(shortcut, nn.Parameter(eye))
    for index, half, module in _readers(model):
        scale = _norm_weight(model.get_submodule(f"{path}.{index}.{NORMS[half]}"))
        _replace(module, _by_rows(module.weight, scale.mul))
    head: Any = model.get_output_embeddings()
    last = _norm_weight(_final_norm(model))
    _replace(head, _by_rows(head.weight, last.mul))  # a parameter of its own from here on
    return rebuilt(model, _sliced_config(model.config, model.config.hidden_size), lambda _, tensor: tensor)


def absorb_rotations(wide: PreTrainedModel, batches: list[Batch], width: int) -> None:
    """Find each basis by `batches`, and rotate and slice the matrices of `wide` (from `folded`) to `width` in place;
    its config does not fit them any more."""
    _, layers = decoder_layers(wide)
    signals, masks, given = _first_inputs(wide, batches, layers)
    read = _by_half(_readers(wide))
    written = _by_half(_writers(wide))
    old = principal_components(signals, masks)[:, :width]  # [hidden, width]
    embedding: Any = wide.get_input_embeddings()
    _replace(embedding, _by_rows(embedding.weight, lambda rows: rows @ old))
    for index, layer in enumerate(layers):
        halves: list[Callable[..., Tensor]] = [
            lambda x, n, index=index, layer=layer: layer.attend(x, **given[n][index]),
            lambda x, n, layer=layer: layer.feed(x),
        ]
        for half, run in enumerate(halves):
            # Signals stay in the original basis; what slicing loses is projected away.
            signals = [run((x.double() @ old @ old.T).to(x), n) for n, x in enumerate(signals)]
            new = principal_components(signals, masks)[:, :width]
            for module in read[index, half]:
                _replace(module, module.weight.double() @ old)
            for module in written[index, half]:
                _replace(module, new.T @ module.weight.double())
                if module.bias is not None:
                    module.bias = nn.Parameter((new.T @ module.bias.double()).to(module.bias))
            shortcut = getattr(layer, SHORTCUTS[half])
            layer.register_parameter(SHORTCUTS[half], nn.Parameter((old.T @ new).to(shortcut)))
            old = new
    head: Any = wide.get_output_embeddings()
    _replace(head, _by_rows(head.weight, lambda rows: rows @ old))


def _by_rows(weight: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of the weight's rows in float64, in the weight's dtype, so many at a time as take little memory."""
    return torch.cat(
        [change(rows.double()).to(weight.dtype) for rows in weight.split(max(1, AT_ONCE // weight.shape[1]))]
    )


def principal_components(signals: list[Tensor], masks: list[Tensor]) -> Tensor:
    """Directions of the residual stream, those with the largest mean square first: orthogonal float64 [D, D].

    `signals` [B, S, D] each, of which the positions in `masks` bool [B, S] count.
    """
    size = signals[0].shape[-1]
    squares = torch.zeros(size, size, dtype=torch.float64, device=signals[0].device)
    for signal, mask in zip(signals, masks, strict=True):
        rows = signal[mask].double()
        squares += rows.T @ rows
    check_finite({"the hidden size's directions": squares})
    return torch.linalg.eigh(squares).eigenvectors.flip(1)  # eigenvalues ascend


def parameters_at(config: PretrainedConfig, width: int) -> int:
    """Parameters of the sliced model of `width`."""
    with torch.device("meta"), no_init_weights():
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(_sliced_config(config, width))
    return skeleton.num_parameters()


def _width(config: PretrainedConfig, wanted: int) -> int:
    """The largest hidden size with which the sliced model has at most `wanted` parameters."""
    widths = range(1, int(config.hidden_size) + 1)  # parameters grow with the width
    width = bisect_right(widths, wanted, key=lambda one: parameters_at(config, one))
    if not width:
        raise UserError(
            f"prune: slicegpt leaves {parameters_at(config, 1):,} parameters at a hidden size of 1, more than the "
            f"{wanted:,} asked for; ask for more"
        )
    return width


def _sliced_config(config: PretrainedConfig, width: int) -> PretrainedConfig:
    given: dict[str, Any] = config.to_dict()
    family = str(given.pop("model_type")).removeprefix(SLICED)
    for key in ("auto_map", "architectures", "per_layer_config"):
        given.pop(key, None)
    norm_size = given.get("norm_size") or given["hidden_size"]
    head_dim = given.get("head_dim") or norm_size // given["num_attention_heads"]
    sliced_class: Any = FAMILIES[family][0]
    new: PretrainedConfig = sliced_class(
        **{**given, "hidden_size": width, "norm_size": norm_size, "head_dim": head_dim, "tie_word_embeddings": False}
    )
    new._attn_implementation = config._attn_implementation
    new.dtype = config.dtype
    return new


def _readers(model: nn.Module) -> Iterator[tuple[int, int, nn.Linear]]:
    """Layer, half (0 attention, 1 FFN) and projection, for all that read the residual stream."""
    for block in prunable_blocks(model):
        for path in dict.fromkeys(m.module for m in (*block.mixed, *block.followers) if m.dim == 0):
            yield block.layer, int(block.kind == "channels"), linear(model, path)


def _writers(model: nn.Module) -> Iterator[tuple[int, int, nn.Linear]]:
    """As _readers, for all that return to the residual stream."""
    for block in prunable_blocks(model):
        for path in dict.fromkeys(m.module for m in block.mixed if m.dim == 1):
            yield block.layer, int(block.kind == "channels"), linear(model, path)


def _by_half(modules: Iterator[tuple[int, int, nn.Linear]]) -> dict[tuple[int, int], list[nn.Linear]]:
    found: dict[tuple[int, int], list[nn.Linear]] = {}
    for layer, half, module in modules:
        found.setdefault((layer, half), []).append(module)
    return found


def _first_inputs(
    model: PreTrainedModel, batches: list[Batch], layers: nn.ModuleList
) -> tuple[list[Tensor], list[Tensor], list[list[dict[str, Any]]]]:
    """By batch: what enters the first layer [B, S, D], which positions are tokens [B, S], and what every layer is given
    besides (masks and positions)."""
    device = next(model.parameters()).device
    signals: list[Tensor] = []
    masks: list[Tensor] = []
    given: list[list[dict[str, Any]]] = []

    def before(index: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if index == 0:
            signals.append(args[0])
        given[-1].append(kwargs)

    handles = [layer.register_forward_pre_hook(partial(before, i), with_kwargs=True) for i, layer in enumerate(layers)]
    for batch in batches:
        given.append([])
        inputs = {key: value.to(device) for key, value in batch.items() if key in MODEL_INPUTS}
        masks.append(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool())
        model(**inputs, use_cache=False, **no_logits(model))
    for handle in handles:
        handle.remove()
    return signals, masks, given


def _final_norm(model: PreTrainedModel) -> nn.Module:
    decoder: Any = model.get_decoder()
    norm: nn.Module = decoder.norm
    return norm


def _norm_weight(norm: Any) -> Tensor:
    weight: Tensor = norm.weight
    return weight.double()


def _replace(module: Any, weight: Tensor) -> None:
    """Give `module` another weight [any shape], in the old one's dtype."""
    old = module.weight
    module.weight = nn.Parameter(weight.to(old), requires_grad=old.requires_grad)
