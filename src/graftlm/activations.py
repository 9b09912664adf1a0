"""What is seen while a model runs: per-sample activations of heads and channels, and the votes drawn from them.

Shapes: B rows, S positions, n samples of the batch, H heads, F channels.
"""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm.advantage import count_of, rank_votes
from graftlm.anatomy import Anatomy, Block, Kind
from graftlm.fused_gate import FusedGates
from graftlm.modes import evaluating
from graftlm.samples import Samples, count_tokens, find_samples
from graftlm.sharding import summed

__all__ = ["MODEL_INPUTS", "ActivationRecorder", "count_tokens"]

Per = Literal["sample", "microbatch"]
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
"""What a pass that only looks needs of a batch, in the order of transformers' forward; labels would cost the loss of
every logit."""


class ActivationRecorder:
    """Watches a model's forward passes and keeps, per block, votes (eq. 3, 5) and sums of activations.

    A head's activation is the squared Frobenius norm of its output before the output projection, a channel's that of
    the gate after its activation function. Passes count when the model is in training mode, or inside `run`;
    what gradient checkpointing recomputes in the backward pass does not, nor does evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        shares: Mapping[Kind, float],
        per: Per = "sample",
        *,
        fused_gate: bool = False,
    ):
        """`fused_gate`: training passes take the channels' statistic where the FFN's product is computed
        (fused_gate.py), at less than the cost of the product alone; `notes` says where that cannot be."""
        self.model = model
        self.anatomy = anatomy
        self.votes_per_sample = {b.name: count_of(shares[b.kind], b.ranked) for b in anatomy.blocks}
        self.per = per
        self.differentiable = False
        """Keep the graph of activations and leave their penalty in `penalty` (activation regularisation)."""
        self.penalty: Tensor | None = None
        self.due: Callable[[], bool] = lambda: True
        """Asked before each training pass whether it is to be assessed; tokens count anyway."""
        self.passes = 0
        """Training passes so far."""
        self.notes: list[str] = []
        self._tokens = 0
        self._tokens_on_device: Tensor | None = None
        self._forced = False
        self._active = self._counts = False
        self._samples = Samples(1, 1, 1)
        self._seen: dict[str, Tensor] = {}
        self._in_graph: frozenset[str] = frozenset()
        """Blocks whose activations are part of the last pass's graph."""
        self._gate_fallback: set[str] = set()
        self._stacks: dict[tuple[Kind, int, int], list[str]] = {}
        """Names of the blocks that are counted together: of one kind, number of units and number of votes."""
        for block in anatomy.blocks:
            key = (block.kind, block.ranked, self.votes_per_sample[block.name])
            self._stacks.setdefault(key, []).append(block.name)
        self.reset()
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        for block in anatomy.blocks:
            self._handles.append(self._watch(block))
        self._fused: FusedGates | None = None
        if fused_gate:
            channels = list(anatomy.of_kind("channels"))
            self._fused = FusedGates(
                model,
                channels,
                wanted=lambda: self._samples if self._active else None,
                see=self._keep,
                off=lambda: self.differentiable,
            )
            self.notes += self._fused.notes

    @property
    def tokens(self) -> int:
        """Tokens of training passes so far, padding not counted. Waits for the device where some were counted there."""
        if self._tokens_on_device is not None:
            self._tokens += int(self._tokens_on_device)
            self._tokens_on_device = None
        return self._tokens

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
        self._keep(block, self._per_sample(x))

    def _keep(self, block: Block, activations: Tensor) -> None:
        # What gradient checkpointing recomputes does not count; but where activations are in the graph, it must
        # compute again all that it computed the first time.
        if self._active:
            self._seen[block.name] = activations

    def _per_sample(self, x: Tensor) -> Tensor:
        """Squared norms per sample and unit: [B, S, units, width] -> float32 [n, units]."""
        if not self.differentiable:
            x = x.detach()
        dtype = torch.promote_types(x.dtype, torch.float32)
        if x.shape[-1] == 1:
            by_token = x.squeeze(-1).to(dtype).square()  # [B, S, units]
        else:
            by_token = torch.linalg.vector_norm(x, dim=3, dtype=dtype).square()
        return self._samples.sum(by_token)

    @torch.compiler.disable
    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen, self._in_graph, self.penalty = {}, frozenset(), None
        training = self.model.training and torch.is_grad_enabled()
        self._active = self._counts = self._forced or training
        if not self._active:
            return
        kwargs = {**dict(zip(MODEL_INPUTS, args, strict=False)), **kwargs}
        inputs = kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs["inputs_embeds"][..., 0]
        shape = tuple(inputs.shape)
        self._samples = find_samples(shape, kwargs.get("attention_mask"), kwargs.get("position_ids"), inputs.device)
        if not self._forced:
            self.passes += 1
            self._count_tokens(self._samples.tokens)
            self._counts = self.due()
            self._active = self._counts or self.differentiable  # the penalty is of every pass
        if self.per == "microbatch":
            self._samples = Samples(1, *shape)

    def _count_tokens(self, tokens: int | Tensor) -> None:
        if isinstance(tokens, int):
            self._tokens += tokens
        else:
            before = self._tokens_on_device
            self._tokens_on_device = tokens if before is None else before + tokens

    @torch.compiler.disable
    def _end(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if not self._active:
            return
        self._active = False
        if output is None:  # the pass raised an error: what it did not reach tells nothing
            self._seen = {}
            return
        for block in self.anatomy.blocks:
            if block.name not in self._seen:
                self._miss(block)
        if self._counts:
            for key in self._stacks:
                self._count(key)
        if self.differentiable and self._seen:
            valid = self._samples.valid
            seen = [a if valid is None else a[valid] for a in self._seen.values()]
            spread = [(a.std(1, correction=0) / a.mean(1)).mean() for a in seen if len(a)]
            self.penalty = torch.stack(spread).mean()
            self._in_graph = frozenset(self._seen)
        self._seen = {}

    def _count(self, key: tuple[Kind, int, int]) -> None:
        """Add what a pass showed of a stack's blocks. Counts stay on the device: fetching them would stall a GPU."""
        names = self._stacks[key]
        found = [i for i, name in enumerate(names) if name in self._seen]
        if not found:
            return
        device = self._seen[names[found[0]]].device
        activations = torch.stack([self._seen[names[i]].detach().to(device) for i in found])  # [blocks, n, units]
        valid = self._samples.valid
        n = torch.full((len(found),), activations.shape[1], device=device) if valid is None else valid.sum()
        added = (rank_votes(activations, key[2], valid), activations.sum(1, dtype=torch.float64), n)
        table = self._table[key] = tuple(t.to(device) for t in self._table[key])
        rows = slice(None) if len(found) == len(names) else found
        for counted, more in zip(table, added, strict=True):
            counted[rows] += more

    def _miss(self, block: Block) -> None:
        if block.gate is None or block.name in self._gate_fallback:
            return
        if not self._gate_fallback:
            warnings.warn(self._note_fallback(), stacklevel=2)
        self._watch_gate(block)

    def _note_fallback(self) -> str:
        note = (
            "the FFN's activation runs inside a fused kernel: channels are assessed by applying it once more to "
            "the gate's output (same statistic, a little slower); the first batch was not counted for them"
        )
        self.notes.append(note)
        return note

    @torch.no_grad()
    def run(self, batches: Iterable[Mapping[str, Tensor]]) -> int:
        """Count forward passes in evaluation mode over `batches` (input_ids [B, S] and perhaps attention_mask,
        position_ids); returns the rows seen. The model's mode is put back."""
        device = next(self.model.parameters()).device
        # Logits of all tokens would take more memory than all else, and nobody looks at them.
        last = no_logits(self.model)
        self._forced = True
        rows = 0
        try:
            with evaluating(self.model):
                for batch in batches:
                    inputs = {k: v.to(device) for k, v in batch.items() if k in MODEL_INPUTS} | last
                    noted = len(self.notes)
                    self.model(**inputs, use_cache=False)
                    if len(self.notes) > noted:  # another way to see was found just now: let it see this batch too
                        self.reset()
                        self.model(**inputs, use_cache=False)
                    rows += len(inputs["input_ids"])
        finally:
            self._forced = False
        return rows

    def reset(self) -> None:
        """Forget all counts; a stage begins."""
        self._table: dict[tuple[Kind, int, int], tuple[Tensor, ...]] = {}
        """By stack: votes int64 [blocks, units], sums float64 [blocks, units], samples int64 [blocks]."""
        for key, names in self._stacks.items():
            shape = (len(names), key[1])
            votes, sums = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.float64)
            self._table[key] = (votes, sums, torch.zeros(len(names), dtype=torch.int64))

    def _by_block(self, which: int) -> dict[str, Tensor]:
        rows = {
            n: row for k, names in self._stacks.items() for n, row in zip(names, self._table[k][which], strict=True)
        }
        return {block.name: rows[block.name] for block in self.anatomy.blocks}

    @property
    def votes(self) -> dict[str, Tensor]:
        """Votes by block: int64 [ranked], where they were counted."""
        return self._by_block(0)

    @property
    def sums(self) -> dict[str, Tensor]:
        """Sums of activations over samples by block: float64 [ranked], where they were counted."""
        return self._by_block(1)

    @property
    def samples(self) -> dict[str, int]:
        """Samples seen by block. Waits for the device."""
        counts = {key: table[2].tolist() for key, table in self._table.items()}
        rows = {n: c for key, names in self._stacks.items() for n, c in zip(names, counts[key], strict=True)}
        return {block.name: rows[block.name] for block in self.anatomy.blocks}

    def mean_activations(self) -> dict[Kind, dict[int, Tensor]]:
        """Mean over samples, those of all ranks, of each unit's activation: {kind: {layer: float64 [ranked]}}, for
        blocks that were seen. All ranks must ask."""
        means: dict[Kind, dict[int, Tensor]] = {kind: {} for kind in self.anatomy.kinds}
        state = self.summed_state()
        for block in self.anatomy.blocks:
            samples = int(state[f"{block.name}.samples"])
            if samples:
                means[block.kind][block.layer] = state[f"{block.name}.sums"].cpu() / samples
        return means

    def summed_tokens(self) -> int:
        """Tokens of training passes so far, over all ranks. All must ask."""
        return int(summed({"tokens": torch.tensor(self.tokens)}, next(self.model.parameters()).device)["tokens"])

    def summed_state(self) -> dict[str, Tensor]:
        """state_dict over all ranks. All must ask."""
        state = self.state_dict()
        flags = {k: v for k, v in state.items() if k.endswith(".fallback")}
        counts = {k: v for k, v in state.items() if k not in flags}
        return summed(counts, next(self.model.parameters()).device) | flags

    def state_dict(self) -> dict[str, Tensor]:
        """Everything counted so far."""
        state = {"tokens": torch.tensor(self.tokens)}
        votes, sums, samples = self.votes, self.sums, self.samples
        for name in votes:
            state[f"{name}.votes"] = votes[name]
            state[f"{name}.sums"] = sums[name]
            state[f"{name}.samples"] = torch.tensor(samples[name])
            state[f"{name}.fallback"] = torch.tensor(name in self._gate_fallback)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._tokens, self._tokens_on_device = int(state["tokens"]), None
        for block in self.anatomy.blocks:
            if state[f"{block.name}.fallback"] and block.name not in self._gate_fallback:
                if not self._gate_fallback:
                    self._note_fallback()
                self._watch_gate(block)
        for key, names in self._stacks.items():
            self._table[key] = tuple(
                torch.stack([state[f"{name}.{what}"] for name in names]) for what in ("votes", "sums", "samples")
            )

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._fused is not None:
            self._fused.close()


def no_logits(model: nn.Module) -> dict[str, Any]:
    """What a forward pass is told whose logits nobody looks at: those of the last token are enough, if it can be."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
