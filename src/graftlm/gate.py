"""The gated product of an FFN, activation(gate) * up, that also says how active each channel was.

One pass over memory in place of four, and only gate and up are saved for the backward pass; activation(gate) is
computed again there. On a CPU the values are those of the two plain operations, bit for bit, and so are the gradients.

Shapes: B rows, S positions, T = B * S tokens, n samples, F channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.samples import Samples
from graftlm.triton_kernels import triton_works

CHUNK = 2**19
"""Values that a CPU takes at a time: few enough to stay in its cache, many enough that calls do not count."""


@dataclass(frozen=True)
class Activation:
    """An activation function with places to write to: f(x), and the gradient of x from that of f(x)."""

    forward: Callable[[Tensor, Tensor], Any]
    """(x, out)"""
    backward: Callable[[Tensor, Tensor, Tensor], Any]
    """(gradient of f(x), x, out)"""


def _gelu(approximate: str) -> Activation:
    aten = torch.ops.aten
    return Activation(
        lambda x, out: aten.gelu.out(x, approximate=approximate, out=out),
        lambda grad, x, out: aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out),
    )


ACTIVATIONS = {
    "silu": Activation(
        lambda x, out: torch.ops.aten.silu.out(x, out=out),
        lambda grad, x, out: torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out),
    ),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu2": Activation(
        lambda x, out: torch.mul(torch.relu(x), torch.relu(x), out=out),
        lambda grad, x, out: torch.mul(grad, 2 * torch.relu(x), out=out),
    ),
}


def name_of(activation: nn.Module) -> str | None:
    """The name in ACTIVATIONS of a model's activation module; None where it is another function.

    Asked by trying: classes and options differ from version to version, values do not.
    """
    x = torch.linspace(-4, 4, 64)
    try:
        expected = activation.forward(x)
    except Exception:  # an activation of more arguments, or with weights of its own elsewhere
        return None
    for name, known in ACTIVATIONS.items():
        known.forward(x, out := torch.empty_like(x))
        if expected.shape == x.shape and torch.equal(expected, out):
            return name
    return None


def gated_product(
    gate: Tensor, up: Tensor, activation: str, samples: Samples | None = None
) -> tuple[Tensor, Tensor | None]:
    """activation(gate) * up, and the sums over each sample of activation(gate)^2.

    Args:
        gate, up: [B, S, F], of one dtype.
        activation: a name in ACTIVATIONS.
        samples: of the batch; None: no sums are taken.

    Returns:
        [B, S, F] in the dtype of `gate`, and float32 (float64 for float64) [n, F], which has no gradient, or None.
    """
    product, sums = _GatedProduct.apply(gate, up, activation, samples)
    return product, sums


def _on_gpu(gate: Tensor) -> bool:
    return gate.is_cuda and gate.dtype != torch.float64 and triton_works()


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, activation: str, samples: Samples | None
    ) -> tuple[Tensor, Tensor | None]:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        if _on_gpu(gate):
            from graftlm import gate_kernels

            product, sums = gate_kernels.forward(gate, up, activation, samples)
        else:
            product, sums = plain_forward(gate, up, activation, samples)
        if sums is not None:
            ctx.mark_non_differentiable(sums)
        return product, sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        grad = grad.contiguous()
        if _on_gpu(gate):
            from graftlm import gate_kernels

            return *gate_kernels.backward(grad, gate, up, ctx.activation), None, None
        return *plain_backward(grad, gate, up, ctx.activation), None, None


def plain_forward(gate: Tensor, up: Tensor, activation: str, samples: Samples | None) -> tuple[Tensor, Tensor | None]:
    """As gated_product, by PyTorch's own operations, some tokens at a time: contiguous [B, S, F] each."""
    function = ACTIVATIONS[activation].forward
    product = torch.empty_like(gate)
    flat_gate, flat_up, flat_product = (t.view(-1, t.shape[-1]) for t in (gate, up, product))  # [T, F]
    dtype = torch.promote_types(gate.dtype, torch.float32)
    sums = None if samples is None else gate.new_zeros(samples.count, gate.shape[-1], dtype=dtype)
    chunks = _chunks(flat_gate)
    buffer = torch.empty_like(flat_gate[chunks[0]])  # [tokens of a chunk, F]
    for chunk in chunks:
        active = buffer[: chunk.stop - chunk.start]
        function(flat_gate[chunk], active)
        torch.mul(active, flat_up[chunk], out=flat_product[chunk])
        if samples is not None and sums is not None:
            for begin, end, sample in samples.pieces(chunk.start, chunk.stop):
                sums[sample] += active[begin - chunk.start : end - chunk.start].to(dtype).square_().sum(0)
    return product, sums


def plain_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up from that of the product: contiguous [B, S, F] each."""
    known = ACTIVATIONS[activation]
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    grad, gate, up, to_gate, to_up = (t.view(-1, t.shape[-1]) for t in (grad, gate, up, of_gate, of_up))  # [T, F]
    chunks = _chunks(gate)
    buffer = torch.empty_like(gate[chunks[0]])
    for chunk in chunks:
        active = buffer[: chunk.stop - chunk.start]
        known.forward(gate[chunk], active)
        torch.mul(grad[chunk], active, out=to_up[chunk])
        torch.mul(grad[chunk], up[chunk], out=active)
        known.backward(active, gate[chunk], to_gate[chunk])
    return of_gate, of_up


def _chunks(flat: Tensor) -> list[slice]:
    """Rows of [T, F] to take at a time. In 32s: rounding then is that of one call over all of them, since only a last
    part of a vector is computed otherwise than the rest. All at once on a GPU, which a cache is no matter of."""
    rows = max(1, len(flat)) if flat.is_cuda else max(32, CHUNK // flat.shape[1] // 32 * 32)
    return [slice(start, min(start + rows, len(flat))) for start in range(0, max(1, len(flat)), rows)]
