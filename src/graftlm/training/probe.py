"""A scaled-down copy of a run, to be timed: first layers, a part of the vocabulary, and real optimizer steps.

No random number of the run is drawn. What the copy (scaled_copy.py) takes is scaled up by plan.py: layers by their
number, the LM head by its rows, both by floating-point operations where rows had to be cut.
"""

import contextlib
import dataclasses
import gc
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from graftlm.anatomy import decoder_layers
from graftlm.apex import Apex
from graftlm.methods import make_method
from graftlm.parts import count_parameters
from graftlm.training.arguments import fuse_loss, training_arguments
from graftlm.training.config import RunConfig
from graftlm.training.layout import run_device
from graftlm.training.scaled_copy import cut, layers_copied, layers_differ, narrow
from graftlm.training.sections import Saved, Sections

HUGE_LAYER = 2**27
"""Weights of a layer above which the copy's is narrower, unless a GPU holds it: with gradients, optimizer state and
copies in bfloat16 a weight takes some 20 bytes."""
EMBEDDING = 2**23
"""Weights that the copy's part of the embedding has at most: the vocabulary may be most of a model."""
PASS_SECONDS = 1.5
"""A forward and backward pass that would take longer gets fewer rows, then shorter ones."""
PASSES, ENOUGH_SECONDS = 5, 5
"""Steps that are timed; no further one begins after so many seconds. The fastest of each part counts: what else runs on
the machine stalls short operations far more than a run's own, so a mean would say more about it than about the run."""
WARM_UP_TOKENS = 64
STEPS = 1000
"""What a method is told of the length of the copy's run: so long that no round of it ends meanwhile."""


@dataclass
class Probe:
    """What the copy took. Seconds and bytes are of one micro-batch of `rows` x `length` tokens."""

    layers: int
    vocabulary: int
    rows: int
    length: int
    depth: float = 1.0
    """The model's layers over those of the copy: by number, where they differ by weights."""
    narrowing: int = 1
    """Width of the model over that of the copy; every other figure is scaled up to the model's width already."""
    forward_layers: float = 0.0
    forward_rest: float = 0.0
    backward_layers: float = 0.0
    backward_rest: float = 0.0
    update: float = 0.0
    """Clipping and optimizer, of all parameters that train."""
    expansion: float = 0.0
    """What Apex or another method adds to an optimizer step, in all layers of the copy."""
    stage: float = 0.0
    """Choosing P and N."""
    trained: int = 0
    """Parameters that train."""
    state_bytes: int = 0
    """Optimizer state of all of them."""
    state_of: dict[int, float] = field(default_factory=dict)
    """Of one parameter, on average, by the bytes that it is held in: slices train in float32 beside bfloat16 weights,
    and the copy has another share of them than the model."""
    saved_layers: int = 0
    """What autograd saves for the backward pass in the layers, parameters left out."""
    copied_layers: int = 0
    """Copies of weights that autocast makes and autograd saves: these do not grow with the micro-batch."""
    copied_head: int = 0
    """Likewise of the LM head; with a fused loss its gradient too."""
    saved_rest: int = 0
    saved_logits: int = 0
    """Likewise, outside the layers: what has a column for each token of the vocabulary."""
    hidden: int = 0
    """One layer's input."""
    fused_loss: bool = False
    """Whether logits exist only some tokens at a time."""


NARROWED = {
    "saved_layers": 1, "saved_rest": 1, "hidden": 1, "copied_head": 1, "copied_layers": 2,
    "forward_layers": 2, "backward_layers": 2, "forward_rest": 1, "backward_rest": 1, "expansion": 2, "stage": 2,
}  # fmt: skip
"""What grows with the width, and with which power of it. Optimizer and its state go by the parameter."""


class _Run:
    """The copy with its optimizer and what trains it: for method apex its Apex, for others the method itself."""

    def __init__(self, config: RunConfig, model: PreTrainedModel, probe: Probe, trained: int, device: torch.device):
        self.config, self.probe, self.device = config, probe, device
        small: Any = cut(model, probe.layers, probe.vocabulary)
        self.model: PreTrainedModel = small.to(device).train()
        self.apex: Apex | None = None
        probe.fused_loss = fuse_loss(config, self.model) is not None
        if config.method == "apex":
            settings = dataclasses.replace(
                config.apex, assessment="random", start="zero", stages=1, stage_by="steps", stage_length=None,
                stage_learning_rates=None,
                budget=None if config.apex.trains == "full" else self._share(trained),
            )  # fmt: skip
            self.apex = Apex(self.model, settings, total_steps=1)
        narrower = dataclasses.replace(config.lora, rank=max(1, config.lora.rank // probe.narrowing))
        self.method = make_method(self.model, dataclasses.replace(config, lora=narrower))
        if self.method is not None:
            self.method.prepare()
        make, options = Trainer.get_optimizer_cls_and_kwargs(training_arguments(config), self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        probe.trained = sum(p.numel() for p in self.parameters)
        self.optimizer: Any = make(self.parameters, **options)
        self.gathered: dict[str, Tensor] = {}
        """Under fsdp2, the weights in bfloat16 that it computes with: what it gathers, and autograd does not keep."""
        self.forward_goes_on = False
        self.sections = Sections(self.model, device)
        self.optimizer.register_step_post_hook(lambda *_: self.sections.mark("stepped"))
        if self.apex is not None:
            self.sections.mark("begin")
            self.apex.start(self.optimizer)
            self.sections.mark("end")
            probe.stage = self.sections.at["end"] - self.sections.at["begin"]
        self.steps = 0
        if self.method is not None:
            self.method.start(self.optimizer, STEPS)
        self.optimizer.register_step_pre_hook(lambda *_: self.sections.mark("restored"))

    def _share(self, trained: int) -> float:
        """The budget under which as many components of these layers train as in the whole model."""
        embeddings = {id(p): p.numel() for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
                      if m is not None for p in m.parameters()}  # fmt: skip
        total = count_parameters(self.model)
        return min(1.0, (trained + (sum(embeddings.values()) if self.config.apex.trains == "half" else 0)) / total)

    def forward_and_backward(self, rows: int, length: int) -> dict[str, float]:
        ids = torch.arange(rows * length, device=self.device).view(rows, length) % self.probe.vocabulary
        inputs = {"input_ids": ids, "labels": ids}
        if self.config.packing and (self.config.document_boundaries or self.config.task == "sft"):
            # Two documents a row: attention then takes the way that keeps them apart.
            inputs["position_ids"] = (torch.arange(length, device=self.device) % -(-length // 2)).expand(rows, -1)
        self.sections.mark("begin")
        self.forward_goes_on = True
        in_gathered = self.config.bf16 and self.config.distributed.strategy == "fsdp2"
        if in_gathered:
            self.gathered = {n: p.to(torch.bfloat16) for n, p in self.model.named_parameters() if "apex." not in n}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16 and not in_gathered):
            output = torch.func.functional_call(self.model, self.gathered, (), inputs | {"use_cache": False})
            penalty = self.apex.penalty() if self.apex is not None else None
            loss = output.loss if penalty is None else output.loss + penalty
        self.forward_goes_on = False
        self.sections.mark("forward_end")
        loss.backward()
        self.sections.mark("end")
        return self.sections.seconds()

    def update(self) -> dict[str, float]:
        at = self.sections.at
        self.sections.mark("begin")
        if self.apex is not None:
            self.apex.pull_back()
        if self.method is not None:
            self.method.after_backward()
        self.sections.mark("pulled")
        if self.config.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])  # the check for NaN
        self.sections.mark("clipped")
        self.optimizer.step()
        self.steps += 1
        if self.method is not None:
            self.method.after_step(self.steps)
        self.sections.mark("applied")
        self.optimizer.zero_grad()
        plain = at["clipped"] - at["pulled"] + at["stepped"] - at["restored"]
        return {"update": plain, "expansion": at["applied"] - at["begin"] - plain}

    @contextlib.contextmanager
    def weighing(self) -> Iterator[None]:
        """Count what autograd saves for the backward pass meanwhile: each piece of memory once, the model's own weights
        not, and not what is let go before the forward pass is over (DoRA's norms)."""
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        seen = set(own)
        probe = self.probe

        def is_gathered(storage: torch.UntypedStorage) -> bool:
            return any(storage.data_ptr() == t.untyped_storage().data_ptr() for t in self.gathered.values())

        head: Any = self.model.get_output_embeddings()
        shapes = {frozenset(m.weight.shape) for m in self.model.modules() if isinstance(m, nn.Linear)}

        def pack(tensor: Tensor) -> Saved:
            kind = None
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen and not is_gathered(storage):
                seen.add(storage.data_ptr())
                copied = self.config.bf16 and tensor.dim() == 2 and frozenset(tensor.shape) in shapes
                # The LM head's gradient, which the fused loss has at once: it does not grow with the tokens either.
                copied = copied or (probe.fused_loss and tensor.shape == head.weight.shape)
                if copied and self.sections.inside:
                    kind = "copied_layers"
                elif copied:
                    kind = "copied_head"
                elif self.sections.inside:
                    kind = "saved_layers"
                elif tensor.shape[-1:] == (probe.vocabulary,):
                    kind = "saved_logits"
                else:
                    kind = "saved_rest"
            if kind is not None:
                setattr(probe, kind, getattr(probe, kind) + storage.nbytes())

            def let_go() -> None:
                if kind is not None and self.forward_goes_on:
                    setattr(probe, kind, getattr(probe, kind) - storage.nbytes())
                    seen.discard(storage.data_ptr())

            return Saved(tensor, let_go)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            yield

    def close(self) -> None:
        self.sections.close()


def measure(
    config: RunConfig,
    model: PreTrainedModel,
    *,
    rows: int,
    length: int,
    layers: int,
    trained: int,
    timed: bool = True,
    at_most: int = HUGE_LAYER,
) -> Probe:
    """Run the copy for a few seconds.

    `rows`, `length`: a micro-batch of the run, in tokens; cut where it would take too long. `trained`: parameters of
    operators and slices in the first `layers` layers (budgets below 100%). `timed`: False counts bytes only.
    `at_most`: weights of a layer (HUGE_LAYER); a copy that has to be narrower has less width, and what it took is
    scaled up: activations with the width, work and copies of weights with its square.
    """
    device = run_device(model)
    model, narrowing = (model, 1) if device.type == "cuda" else narrow(model, at_most)
    trained //= narrowing**2
    embedding: Any = model.get_input_embeddings()
    vocabulary = min(embedding.weight.shape[0], max(1, EMBEDDING // embedding.weight.shape[1]))
    in_layers = [count_parameters(layer) for layer in decoder_layers(model)[1]]
    depth = len(in_layers) / layers
    if layers_differ(model):
        depth = sum(in_layers) / sum(in_layers[i] for i in layers_copied(model, layers))
    probe = Probe(layers, vocabulary, rows, length, depth, narrowing)
    with torch.random.fork_rng():
        run = _Run(config, model, probe, trained, device)
        try:
            short = min(length, WARM_UP_TOKENS)
            warm_up = [sum(run.forward_and_backward(1, short).values()) for _ in range(PASSES)]
            run.optimizer.zero_grad()
            a_token = min(warm_up) / short  # the first one also pays for what is set up once
            while probe.rows * probe.length * a_token > PASS_SECONDS and probe.rows * probe.length > short:
                if probe.rows > 1:
                    probe.rows = probe.rows // 2
                else:
                    probe.length = max(short, probe.length // 2)
            # By their shapes, autocast's copies of weights are told from activations.
            sizes = {size for m in run.model.modules() if isinstance(m, nn.Linear) for size in m.weight.shape}
            while config.bf16 and probe.rows * probe.length in sizes:
                probe.length -= 1
            with run.weighing():
                run.forward_and_backward(probe.rows, probe.length)
            run.update()
            probe.hidden = run.sections.hidden
            probe.state_bytes = _state_bytes(run.optimizer.state.values())
            for size in {p.element_size() for p in run.parameters}:
                alike = [p for p in run.parameters if p.element_size() == size]
                held = _state_bytes(run.optimizer.state[p] for p in alike if p in run.optimizer.state)
                probe.state_of[size] = held / sum(p.numel() for p in alike)
            begun = time.perf_counter()
            times: list[dict[str, float]] = []
            while timed and len(times) < PASSES and (not times or time.perf_counter() - begun < ENOUGH_SECONDS):
                times.append(run.forward_and_backward(probe.rows, probe.length) | run.update())
            for name in times[0] if times else ():
                setattr(probe, name, min(t[name] for t in times))
        finally:
            run.close()
            if device.type == "cuda":  # the run has its memory to itself, and a peak of its own
                del run
                gc.collect()  # hooks hold it in circles
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    for name, power in NARROWED.items():
        setattr(probe, name, getattr(probe, name) * narrowing**power)
    return probe


def _state_bytes(states: Iterable[Mapping[str, Any]]) -> int:
    """What parameters share (the code book of 8-bit states) counts once."""
    tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())
