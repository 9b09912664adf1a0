"""What is seen while a model runs: per-sample activations of heads and channels, and the votes drawn from them.

Shapes: B rows, S positions, n samples of the batch, H heads, F channels.
"""

import contextlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce, is_initialized

from graftlm.advantage import count_of, rank_votes
from graftlm.anatomy import Anatomy, Block, Kind

Per = Literal["sample", "microbatch"]
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
"""What a pass that only looks needs of a batch, in the order of transformers' forward; labels would cost the loss of
every logit."""


def sample_matrix(
    shape: tuple[int, int], attention_mask: Tensor | None, position_ids: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which token belongs to which sample, as float32 0/1 [n, B * S]; None when every row is one whole sample.

    A sample is a row, or a document in it where position_ids restart. Padding belongs to none: positions that
    attention_mask hides, and documents of a single token (packed blocks are padded with such).
    """
    rows, length = shape
    if attention_mask is not None and (attention_mask.dim() != 2 or bool(attention_mask.all())):
        attention_mask = None
    starts = torch.zeros(rows, length, dtype=torch.bool, device=device)
    starts[:, 0] = True
    packed = position_ids is not None and position_ids.dim() == 2 and attention_mask is None
    if packed and position_ids is not None:
        starts[:, 1:] |= position_ids.expand(rows, -1).diff(dim=1) != 1
        packed = bool(starts[:, 1:].any())
    if attention_mask is None and not packed:
        return None
    sample = starts.flatten().cumsum(0) - 1  # [B * S]
    members = nn.functional.one_hot(sample).T.to(torch.float32)  # [n, B * S]
    if attention_mask is not None:
        members = members * attention_mask.flatten().to(torch.float32)
    return members[members.sum(1) > (1 if packed else 0)]


def count_tokens(inputs: Mapping[str, Any]) -> int:
    """Tokens of a batch, padding not counted."""
    ids = inputs["input_ids"]
    members = sample_matrix(tuple(ids.shape), inputs.get("attention_mask"), inputs.get("position_ids"), ids.device)
    return ids.numel() if members is None else int(members.sum())


class ActivationRecorder:
    """Watches a model's forward passes and keeps, per block, votes (eq. 3, 5) and sums of activations.

    A head's activation is the squared Frobenius norm of its output before the output projection, a channel's that of
    the gate after its activation function. Passes count when the model is in training mode, or inside `run`;
    what gradient checkpointing recomputes in the backward pass does not, nor does evaluation.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, shares: Mapping[Kind, float], per: Per = "sample"):
        self.model = model
        self.anatomy = anatomy
        self.votes_per_sample = {b.name: count_of(shares[b.kind], b.ranked) for b in anatomy.blocks}
        self.per = per
        self.differentiable = False
        """Keep the graph of activations and leave their penalty in `penalty` (activation regularisation)."""
        self.penalty: Tensor | None = None
        self.tokens = 0
        """Tokens of training passes so far, padding not counted."""
        self.notes: list[str] = []
        self._forced = False
        self._active = False
        self._members: Tensor | None = None
        self._seen: dict[str, Tensor] = {}
        self._in_graph: frozenset[str] = frozenset()
        """Blocks whose activations are part of the last pass's graph."""
        self._gate_fallback: set[str] = set()
        self.reset()
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        for block in anatomy.blocks:
            self._handles.append(self._watch(block))

    def _watch(self, block: Block) -> torch.utils.hooks.RemovableHandle:
        module = self.model.get_submodule(block.probe)
        if block.kind == "heads":

            def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
                if self._looks_at(block):
                    self._see(block, args[0].unflatten(-1, (block.ranked, block.width)))  # [B, S, H, D]

            return module.register_forward_pre_hook(before)

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            if self._looks_at(block):
                self._see(block, output.unsqueeze(-1))

        return module.register_forward_hook(after)

    def _watch_gate(self, block: Block) -> None:
        """For kernels that fuse the activation with the product: take the gate's output and apply it again."""
        assert block.gate is not None
        activation = self.model.get_submodule(block.probe)

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            if self._looks_at(block):
                gate = output[..., : block.components]  # the first rows, where gate and up are one module
                with contextlib.nullcontext() if self.differentiable else torch.no_grad():
                    gate = activation.forward(gate)  # not __call__, which would fire our own hook on it
                self._see(block, gate.unsqueeze(-1))

        self._gate_fallback.add(block.name)
        self._handles.append(self.model.get_submodule(block.gate).register_forward_hook(after))

    def _looks_at(self, block: Block) -> bool:
        return self._active or (block.name in self._in_graph and torch.is_grad_enabled())

    def _see(self, block: Block, x: Tensor) -> None:
        activations = self._per_sample(x)
        # What gradient checkpointing recomputes does not count; but where activations are in the graph, it must
        # compute again all that it computed the first time.
        if self._active:
            self._seen[block.name] = activations

    def _per_sample(self, x: Tensor) -> Tensor:
        """Squared norms per sample and unit: [B, S, units, width] -> float32 [n, units]."""
        if not self.differentiable:
            x = x.detach()
        dtype = self._dtype(x)
        if x.shape[-1] == 1:
            by_token = x.squeeze(-1).to(dtype).square()  # [B, S, units]
        else:
            by_token = torch.linalg.vector_norm(x, dim=3, dtype=dtype).square()
        if self.per == "microbatch":
            return by_token.sum((0, 1))[None]
        if self._members is None:
            return by_token.sum(1)
        with torch.autocast(by_token.device.type, enabled=False):  # which would round the sums to bfloat16
            return self._members.to(dtype) @ by_token.flatten(0, 1)

    @staticmethod
    def _dtype(x: Tensor) -> torch.dtype:
        return torch.promote_types(x.dtype, torch.float32)

    @torch.compiler.disable
    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen, self._in_graph, self.penalty = {}, frozenset(), None
        self._active = self._forced or (self.model.training and torch.is_grad_enabled())
        if not self._active:
            return
        kwargs = {**dict(zip(MODEL_INPUTS, args, strict=False)), **kwargs}
        inputs = kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs["inputs_embeds"][..., 0]
        mask = kwargs.get("attention_mask")
        self._members = sample_matrix(tuple(inputs.shape), mask, kwargs.get("position_ids"), inputs.device)
        if not self._forced:
            self.tokens += inputs.numel() if self._members is None else int(self._members.sum())

    @torch.compiler.disable
    def _end(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if not self._active:
            return
        self._active = False
        for block in self.anatomy.blocks:
            if block.name not in self._seen:
                self._miss(block)
                continue
            self._count(block.name, self._seen[block.name].detach())
        if self.differentiable and self._seen:
            spread = [(a.std(1, correction=0) / a.mean(1)).mean() for a in self._seen.values() if len(a)]
            self.penalty = torch.stack(spread).mean()
            self._in_graph = frozenset(self._seen)
        self._seen = {}

    def _count(self, name: str, activations: Tensor) -> None:
        """Add a batch's activations [n, units]. Counts stay on the device: fetching them would stall a GPU."""
        if len(activations):
            votes = rank_votes(activations, self.votes_per_sample[name])
            self.votes[name] = self.votes[name].to(votes.device) + votes
            self.sums[name] = self.sums[name].to(votes.device) + activations.sum(0, dtype=torch.float64)
            self.samples[name] += len(activations)

    def _miss(self, block: Block) -> None:
        if block.gate is None or block.name in self._gate_fallback:
            return
        if not self._gate_fallback:
            note = (
                "the FFN's activation runs inside a fused kernel: channels are assessed by applying it once more to "
                "the gate's output (same statistic, a little slower); the first batch was not counted for them"
            )
            self.notes.append(note)
            warnings.warn(note, stacklevel=2)
        self._watch_gate(block)

    @torch.no_grad()
    def run(self, batches: Iterable[Mapping[str, Tensor]]) -> int:
        """Count forward passes in evaluation mode over `batches` (input_ids [B, S] and perhaps attention_mask,
        position_ids); returns the rows seen. The model's mode is put back."""
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        self._forced = True
        rows = 0
        try:
            for batch in batches:
                inputs = {k: v.to(device) for k, v in batch.items() if k in MODEL_INPUTS}
                noted = len(self.notes)
                self.model(**inputs, use_cache=False)
                if len(self.notes) > noted:  # another way to see was found just now: let it see this batch too
                    self.reset()
                    self.model(**inputs, use_cache=False)
                rows += len(inputs["input_ids"])
        finally:
            self._forced = False
            self.model.train(was_training)
        return rows

    def reset(self) -> None:
        """Forget all counts; a stage begins."""
        blocks = self.anatomy.blocks
        self.votes = {b.name: torch.zeros(b.ranked, dtype=torch.int64) for b in blocks}
        self.sums = {b.name: torch.zeros(b.ranked, dtype=torch.float64) for b in blocks}
        self.samples = dict.fromkeys((b.name for b in blocks), 0)

    def reduce(self) -> None:
        """Sum counts over ranks, where there are several."""
        if not is_initialized():
            return
        for name in self.votes:
            device = next(self.model.parameters()).device
            for table in (self.votes, self.sums):
                moved = table[name].to(device)
                all_reduce(moved, ReduceOp.SUM)
                table[name] = moved.cpu()
            count = torch.tensor(self.samples[name], device=device)
            all_reduce(count, ReduceOp.SUM)
            self.samples[name] = int(count)

    def mean_activations(self) -> dict[Kind, dict[int, Tensor]]:
        """Mean over samples of each unit's activation: {kind: {layer: float64 [ranked]}}, for blocks that were seen."""
        means: dict[Kind, dict[int, Tensor]] = {kind: {} for kind in self.anatomy.kinds}
        for block in self.anatomy.blocks:
            if self.samples[block.name]:
                means[block.kind][block.layer] = self.sums[block.name].cpu() / self.samples[block.name]
        return means

    def state_dict(self) -> dict[str, Tensor]:
        """Everything counted so far."""
        state = {"tokens": torch.tensor(self.tokens)}
        for name in self.votes:
            state[f"{name}.votes"] = self.votes[name]
            state[f"{name}.sums"] = self.sums[name]
            state[f"{name}.samples"] = torch.tensor(self.samples[name])
            state[f"{name}.fallback"] = torch.tensor(name in self._gate_fallback)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.tokens = int(state["tokens"])
        for block in self.anatomy.blocks:
            name = block.name
            if state[f"{name}.fallback"] and name not in self._gate_fallback:
                self._watch_gate(block)
            self.votes[name] = state[f"{name}.votes"].clone()
            self.sums[name] = state[f"{name}.sums"].clone()
            self.samples[name] = int(state[f"{name}.samples"])

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
