"""How much each decoder layer matters: how unlike its output is to its input (Adapt-Pruner, section 3.1.1, eq. 3-5)."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.activations import MODEL_INPUTS
from graftlm.anatomy import decoder_layers
from graftlm.errors import UserError
from graftlm.modes import evaluating
from graftlm.pruning.settings import Similarity


class LayerWatch:
    """While open, every forward pass of the model counts: per layer, the similarity of input and output per token,
    averaged over tokens. Padding does not count.

    The passes that measure components are seen too, so a layer's importance need cost no pass of its own.
    """

    def __init__(self, model: nn.Module, similarity: Similarity = "cosine"):
        self._model = model
        self._similarity = similarity
        layers = decoder_layers(model)[1]
        # On the layers' own devices, so that no pass waits for them.
        self._sums = [torch.zeros((), dtype=torch.float64)] * len(layers)
        self._tokens = [0] * len(layers)
        self._counts: Tensor | None = None
        self._handles: list[Any] = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for i, layer in enumerate(layers):
            self._handles.append(layer.register_forward_hook(self._after(i), with_kwargs=True))

    def _begin(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._counts = mask.bool() if mask is not None and mask.dim() == 2 else None

    def _after(self, index: int) -> Any:
        @torch.no_grad()
        def after(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]  # [B, S, d]
            after = output[0] if isinstance(output, tuple) else output
            values = similarities(before, after, self._similarity)  # [B, S]
            if self._counts is not None:
                values = values[self._counts.to(values.device)]
            total = values.sum(dtype=torch.float64)
            self._sums[index] = self._sums[index].to(total.device) + total
            self._tokens[index] += values.numel()

        return after

    @torch.no_grad()
    def run(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Let the decoder see every batch, without the logits; the model's mode is put back."""
        model: Any = self._model
        device = next(model.parameters()).device
        with evaluating(model):
            for batch in batches:
                inputs = {key: value.to(device) for key, value in batch.items() if key in MODEL_INPUTS}
                self._begin(model, (), inputs)  # the decoder is called without its head
                model.get_decoder()(**inputs, use_cache=False)

    @property
    def seen(self) -> bool:
        return all(self._tokens)

    def importance(self) -> Tensor:
        """Of every layer: float64 [layers], mean 0, largest absolute value 1 (all 0 where layers do not differ).

        Raises UserError where a layer's is NaN or Inf."""
        means = [float(total) / count for total, count in zip(self._sums, self._tokens, strict=True)]
        for i, value in enumerate(means):
            if not math.isfinite(value):
                raise UserError(
                    f"prune: the importance of layer {i} is NaN or Inf; the model is broken, or its dtype too narrow"
                )
        return normalised(-torch.tensor(means, dtype=torch.float64))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def layer_importance(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], similarity: Similarity = "cosine"
) -> Tensor:
    """Importance of every decoder layer on `batches` (input_ids [B, S], attention_mask), by one forward pass:
    float64 [layers], mean 0, largest absolute value 1."""
    watch = LayerWatch(model, similarity)
    try:
        watch.run(batches)
        return watch.importance()
    finally:
        watch.close()


def similarities(before: Tensor, after: Tensor, similarity: Similarity) -> Tensor:
    """How alike the vectors of two [..., d] are, float32 [...]: the cosine, or the negative distance."""
    before, after = before.float(), after.float()
    if similarity == "cosine":
        return F.cosine_similarity(before, after, dim=-1)
    return -torch.linalg.vector_norm(after - before, ord=2 if similarity == "euclidean" else 1, dim=-1)


def normalised(importance: Tensor) -> Tensor:
    """Minus the mean over layers, divided by the largest absolute value (eq. 4 and 5)."""
    centred = importance - importance.mean()
    # Layers that are all alike leave nothing but rounding, which must not be blown up to 1.
    largest = centred.abs().max()
    nothing = largest <= 1e-12 * importance.abs().max()
    return torch.zeros_like(centred) if nothing else centred / largest
