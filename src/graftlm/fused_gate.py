"""Putting the gated product of gate.py in the place of a model's own, where that changes nothing but the cost."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.anatomy import Block
from graftlm.gate import gated_product, name_of
from graftlm.modes import replace_forward
from graftlm.samples import Samples


class FusedGates:
    """While installed, FFNs of a model in training mode compute their product and its statistic in one pass.

    In evaluation mode, under torch.compile (which fuses by itself) and while `off` says so, the model's own forward
    runs, which calls the activation module.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        *,
        wanted: Callable[[], Samples | None],
        see: Callable[[Block, Tensor], None],
        off: Callable[[], bool],
    ):
        """Args:
        blocks: of channels.
        wanted: the samples of this pass, if it is assessed.
        see: told a block and its sums of squares [n, F].
        """
        self._model, self._wanted, self._see, self._off = model, wanted, see, off
        self.notes: list[str] = []
        """Why some FFN computes as before."""
        self._undo: list[Callable[[], None]] = []
        reasons = [self._install(block) for block in blocks]
        for reason in dict.fromkeys(filter(None, reasons)):
            self.notes.append(f"fused_gate: not used where {reason}; channels are assessed by a hook there")

    def _install(self, block: Block) -> str | None:
        """Replace the forward of one block's FFN; returns why not."""
        if block.feed_forward is None:
            return "gate and up are one module, or the family is not known"
        feed_forward = self._model.get_submodule(block.feed_forward)
        own: Any = type(feed_forward).forward
        if "forward" in vars(feed_forward) or not own.__module__.startswith("transformers.models."):
            return "another library has replaced the FFN's forward"
        activation = self._model.get_submodule(block.probe)
        name = name_of(activation)
        if name is None:
            return f"the activation is {type(activation).__name__}"
        paths = {matrix.role: matrix.module for matrix in block.mixed}
        local = {role: path.removeprefix(f"{block.feed_forward}.") for role, path in paths.items()}
        original = feed_forward.forward

        def forward(x: Tensor) -> Tensor:
            # Not by whether gradients are on: gradient checkpointing must compute the same both times.
            if torch.compiler.is_compiling() or not self._model.training or self._off():
                result: Tensor = original(x)
                return result
            # Looked up each time: wrappers (LoRA, quantisation) replace modules.
            gate = feed_forward.get_submodule(local["gate"])(x)
            up = feed_forward.get_submodule(local["up"])(x)
            if gate.dtype == up.dtype and gate.dim() == 3:
                product, sums = gated_product(gate, up, name, self._wanted())
                if sums is not None:
                    self._see(block, sums)
            else:
                product = activation(gate) * up
            result = feed_forward.get_submodule(local["down"])(product)
            return result

        self._undo.append(replace_forward(feed_forward, forward))
        return None

    def close(self) -> None:
        """Give every FFN its own forward back."""
        for undo in self._undo:
            undo()
        self._undo = []
