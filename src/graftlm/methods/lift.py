"""LIFT: of every matrix, the entries that are largest after rank reduction train.

Source: Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused
Supervised Fine-Tuning", ICML 2025, arXiv 2506.00772, and facts of its published code: every linear layer of the decoder
takes part, embeddings, norms, biases and LM head do not train; principal entries are those of largest magnitude in the
matrix's best approximation of rank r; they are chosen anew every so many steps, and the optimizer's state stays with
entries that stay and begins at zero for the others. Trains 5% of each matrix (the abstract's figure; the code gives
each matrix as many entries as a LoRA of rank 128, once 32, would have, which `lift.budget` comes near to).

The values of those entries are a parameter of their own, in float32, so the optimizer's state is no larger than what
trains; a matrix's whole gradient exists only while its layer is passed backwards.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from graftlm.advantage import count_of
from graftlm.anatomy import decoder_linears
from graftlm.errors import UserError
from graftlm.methods.base import Batches, Method
from graftlm.methods.masks import top_entries
from graftlm.methods.sparse_settings import LiftSettings
from graftlm.modes import replace_forward
from graftlm.moments import moments_of
from graftlm.parts import count_parameters
from graftlm.training.config import RunConfig

CONTAINER = "lift"
"""Name under which the entries live in the model."""


def low_rank(weight: Tensor, rank: int, iterations: int | None = None) -> Tensor:
    """The best approximation of `weight` [out, in] of that rank, in float32 at least; with `iterations`, a randomised
    one of as many subspace iterations."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    rank = min(rank, *weight.shape)
    if iterations is None:
        u, s, v = torch.linalg.svd(wide, full_matrices=False)
        return cast(Tensor, (u[:, :rank] * s[:rank]) @ v[:rank])
    u, s, v = torch.svd_lowrank(wide, q=min(2 * rank, *weight.shape), niter=iterations)
    return cast(Tensor, (u[:, :rank] * s[:rank]) @ v[:, :rank].T)


class Entries(nn.Module):
    """Some entries of one weight, as a trainable parameter; the weight holds the same values, rounded to its dtype."""

    index: Tensor

    def __init__(self, weight: Tensor, count: int):
        super().__init__()
        device = weight.device
        values = weight.detach().flatten()[:count].to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        self.values = nn.Parameter(values)
        # Which entries of the flattened weight, ascending. Saved with the model; 32 bits where they are enough.
        dtype = torch.int32 if weight.numel() < 2**31 else torch.int64
        self.register_buffer("index", torch.arange(count, dtype=dtype, device=device))

    @torch.no_grad()
    def choose(self, weight: Tensor, mask: Tensor, state: Mapping[str, Any] | None = None) -> None:
        """Train the entries of `mask`, which has as many as before. Values and the optimizer's `state` stay with those
        that train already; the others take theirs from `weight`, and zero."""
        found = mask.flatten().nonzero()[:, 0]
        place = torch.searchsorted(self.index.long(), found).clamp(max=len(found) - 1)
        stays = self.index[place] == found
        place = place[stays]
        values = weight.flatten()[found].to(self.values.dtype)
        if state is not None:
            values[stays] = self.values[place]
            for kept in moments_of(state, self.values):
                moved = torch.zeros_like(kept)
                moved[stays] = kept[place]
                kept.copy_(moved)
        self.values.copy_(values)
        self.index.copy_(found)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        weight.view(-1).index_copy_(0, self.index.long(), self.values.to(weight.dtype))


class _EntriesLinear(torch.autograd.Function):
    """y = x W^T + b, whose backward pass keeps the gradients of some entries of W alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, index)
        ctx.dtype = values.dtype
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, weight, index = ctx.saved_tensors
        dy = grad_outputs[0]
        with torch.autocast(dy.device.type, enabled=False):  # dtypes are those of the forward pass
            dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
            whole = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # [out, in]
            return dx, None, None, None, whole.flatten().index_select(0, index).to(ctx.dtype)


def install(layer: nn.Linear, entries: Entries) -> Callable[[], None]:
    """Let `entries` take the gradient of the layer's weight, which is frozen by the caller; returns what undoes it."""

    def forward(x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        found: Tensor = _EntriesLinear.apply(x, layer.weight, layer.bias, entries.index, entries.values)
        return found

    return replace_forward(layer, forward)


class Lift(Method):
    def __init__(self, model: PreTrainedModel, config: RunConfig):
        super().__init__(model, config)
        self.settings: LiftSettings = config.lift
        self.layers = decoder_linears(model)
        if not self.layers:
            raise UserError(f"method: lift finds no linear layer in {type(model).__name__}; use gmt")
        self.total = count_parameters(model)
        self.share = self._share()
        self._trained_before: set[str] = set()
        self._undo: list[Callable[[], None]] = []
        self._optimizer: Any = None

    def _share(self) -> float:
        if self.settings.budget is None:
            return self.settings.share
        held = sum(self._layer(name).weight.numel() for name in self.layers)
        share = self.settings.budget * self.total / held
        if share > 1:
            raise UserError(
                f"lift.budget: {self.settings.budget:.4g} is more than all matrices that LIFT trains "
                f"({held / self.total:.4g} of all parameters); lower it"
            )
        return share

    def _layer(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.model.get_submodule(name))

    def _entries(self, name: str) -> Entries:
        return cast(Entries, self.model.get_submodule(f"{CONTAINER}.{name.replace('.', '-')}"))

    # -- the contract -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        if self.settings.interval and not self.config.state_moves:
            raise UserError(
                f"lift.interval: the state of optim: {self.config.optim} cannot move with its entries; set it to 0, or "
                "optim: adamw_torch"
            )
        self._trained_before = {name for name, p in self.model.named_parameters() if p.requires_grad}
        self.model.requires_grad_(False)
        container = nn.ModuleDict()
        for name in self.layers:
            layer = self._layer(name)
            entries = Entries(layer.weight, count_of(self.share, layer.weight.numel()))
            container[name.replace(".", "-")] = entries
            self._undo.append(install(layer, entries))
        self.model.add_module(CONTAINER, container)

    def look(self, batches: Batches) -> None:
        self.choose(0)

    def start(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        self._optimizer = optimizer

    def after_step(self, step: int) -> None:
        for name in self.layers:
            self._entries(name).write(self._layer(name).weight)
        if self.settings.interval and step % self.settings.interval == 0:
            self.choose(step)

    @torch.no_grad()
    def choose(self, step: int) -> None:
        """Choose the principal entries of all matrices as they are now."""
        settings = self.settings
        devices = list({p.device for p in self.model.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices, enabled=settings.svd_iterations is not None):
            if settings.svd_iterations is not None:
                torch.manual_seed(self.config.seed * 1_000_003 + step)
            for name in self.layers:
                entries, weight = self._entries(name), self._layer(name).weight
                near = low_rank(weight, settings.rank, settings.svd_iterations)
                state = self._optimizer.state.get(entries.values, {}) if self._optimizer is not None else None
                entries.choose(weight, top_entries(near.abs_(), entries.values.numel()), state)

    def finish(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []
        delattr(self.model, CONTAINER)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._trained_before)

    def resolved(self) -> RunConfig:
        # Which entries train costs nothing; SVDs are seldom, and may take long.
        return replace(self.config, lift=replace(self.settings, share=self.share, budget=None, interval=0))

    def gradients(self) -> dict[str, int]:
        """Those of whole matrices are worked out, whatever trains of them."""
        return {name: self._layer(name).weight.numel() for name in self.layers}

    @property
    def trainable(self) -> int:
        return sum(count_of(self.share, self._layer(name).weight.numel()) for name in self.layers)

    @property
    def notes(self) -> list[str]:
        narrow = min(min(self._layer(name).weight.shape) for name in self.layers)
        found = [f"trainable: {self.trainable / self.total:.3%} of all parameters, {self.share:.3%} of each matrix"]
        if self.settings.rank >= narrow:
            found.append(f"rank {self.settings.rank} reduces nothing of the narrowest matrix, which is {narrow} wide")
        return found
