"""A scaled-down copy of a run, to be timed: first layers, a part of the vocabulary, and real optimizer steps.

Nothing of the model itself is touched and no random number of the run is drawn. What the copy takes is scaled up by
plan.py: layers by their number, the LM head by its rows, both by floating-point operations where rows had to be cut.
"""

import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from graftlm.anatomy import decoder_layers
from graftlm.apex import Apex
from graftlm.training.arguments import training_arguments
from graftlm.training.config import RunConfig

LAYERS = 2
"""Layers of the copy: more would be no more exact, since each layer is timed where it runs, not by a difference."""
LARGE_LAYER = 2**25
"""Weights of a layer above which the copy has only one."""
EMBEDDING = 2**23
"""Weights that the copy's part of the embedding has at most: the vocabulary may be most of a model."""
PASS_SECONDS = 1.5
"""A forward and backward pass that would take longer gets fewer rows, then shorter ones."""
PASSES, ENOUGH_SECONDS = 5, 5
"""Steps that are timed; no further one begins after so many seconds. The fastest of each part counts: what else runs on
the machine stalls short operations far more than a run's own, so a mean would say more about it than about the run."""
WARM_UP_TOKENS = 64


@dataclass
class Probe:
    """What the copy took. Seconds and bytes are of one micro-batch of `rows` x `length` tokens."""

    layers: int
    vocabulary: int
    rows: int
    length: int
    forward_layers: float = 0.0
    forward_rest: float = 0.0
    backward_layers: float = 0.0
    backward_rest: float = 0.0
    update: float = 0.0
    """Clipping and optimizer, of all parameters that train."""
    expansion: float = 0.0
    """What Apex adds to an optimizer step, in all layers of the copy."""
    stage: float = 0.0
    """Choosing P and N."""
    trained: int = 0
    """Parameters that train."""
    state_bytes: int = 0
    """Optimizer state of all of them."""
    saved_layers: int = 0
    """What autograd saves for the backward pass in the layers, parameters left out."""
    copied_layers: int = 0
    """Copies of weights that autocast makes and autograd saves: these do not grow with the micro-batch."""
    copied_head: int = 0
    saved_rest: int = 0
    saved_logits: int = 0
    """Likewise, outside the layers: what has a column for each token of the vocabulary."""
    hidden: int = 0
    """One layer's input."""
    logits: int = 0


def run_device(model: nn.Module) -> torch.device:
    """Where training will run: Trainer's choice, so far as it can be known beforehand."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def layers_to_copy(model: PreTrainedModel) -> int:
    """How many layers a copy of `model` has."""
    layers = decoder_layers(model)[1]
    return min(len(layers), LAYERS if sum(p.numel() for p in layers[0].parameters()) <= LARGE_LAYER else 1)


def cut(model: PreTrainedModel, layers: int, vocabulary: int) -> PreTrainedModel:
    """A copy with the first `layers` layers and `vocabulary` rows of embedding and LM head; the rest is not copied.

    A model on the meta device gives a copy on the CPU with random weights.
    """
    _, found = decoder_layers(model)
    kept = nn.ModuleList(found[:layers])
    memo: dict[int, Any] = {}
    memo[id(found)] = copy.deepcopy(kept, memo)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in module.parameters() if module is not None else ():
            part = parameter.detach()[:vocabulary].clone()
            memo[id(parameter)] = memo.get(id(parameter), nn.Parameter(part, parameter.requires_grad))
    small = copy.deepcopy(model, memo)
    text: Any = small.config.get_text_config()
    text.num_hidden_layers = len(kept)
    text.vocab_size = small.config.vocab_size = vocabulary
    embedding: Any = small.get_input_embeddings()
    embedding.num_embeddings, embedding.padding_idx = vocabulary, None
    if next(small.parameters()).is_meta:
        small = small.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*small.parameters(), *small.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(std=0.02)
    return small


class _Sections:
    """Times of a forward and backward pass inside and outside the layers, by hooks on the first and the last one."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        self.device = device
        self.at: dict[str, float] = {}
        self.inside = False
        self.hidden = 0
        layers = decoder_layers(model)[1]
        self._handles = [
            layers[0].register_forward_pre_hook(self._enter, with_kwargs=True),
            layers[-1].register_forward_hook(self._leave),
        ]

    def mark(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.at[name] = time.perf_counter()

    def _on_gradient(self, tensor: Tensor, name: str) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self.mark(name))

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.hidden = hidden.numel() * hidden.element_size()
        self._on_gradient(hidden, "layers_backward_end")
        self.mark("layers_begin")
        self.inside = True

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.inside = False
        self.mark("layers_end")
        self._on_gradient(output if isinstance(output, Tensor) else output[0], "layers_backward_begin")

    def seconds(self) -> dict[str, float]:
        """The four figures of a Probe, of the pass just taken."""
        at = self.at
        forward = at["layers_end"] - at["layers_begin"]
        # Where nothing before the layers trains, no gradient arrives there.
        backward = at.pop("layers_backward_end", at["end"]) - at["layers_backward_begin"]
        return {
            "forward_layers": forward,
            "forward_rest": at["forward_end"] - at["begin"] - forward,
            "backward_layers": backward,
            "backward_rest": at["end"] - at["forward_end"] - backward,
        }

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Run:
    """The copy with its optimizer and, for method apex, its Apex."""

    def __init__(self, config: RunConfig, model: PreTrainedModel, probe: Probe, trained: int, device: torch.device):
        self.config, self.probe, self.device = config, probe, device
        small: Any = cut(model, probe.layers, probe.vocabulary)
        self.model: PreTrainedModel = small.to(device).train()
        self.apex: Apex | None = None
        if config.method == "apex":
            settings = dataclasses.replace(
                config.apex, assessment="random", stages=1, stage_by="steps", stage_length=None,
                stage_learning_rates=None,
                budget=None if config.apex.trains == "full" else self._share(trained),
            )  # fmt: skip
            self.apex = Apex(self.model, settings, total_steps=1)
        make, options = Trainer.get_optimizer_cls_and_kwargs(training_arguments(config), self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        probe.trained = sum(p.numel() for p in self.parameters)
        self.optimizer: Any = make(self.parameters, **options)
        self.sections = _Sections(self.model, device)
        self.optimizer.register_step_post_hook(lambda *_: self.sections.mark("stepped"))
        if self.apex is not None:
            self.sections.mark("begin")
            self.apex.start(self.optimizer)
            self.sections.mark("end")
            probe.stage = self.sections.at["end"] - self.sections.at["begin"]
        self.optimizer.register_step_pre_hook(lambda *_: self.sections.mark("restored"))

    def _share(self, trained: int) -> float:
        """The budget under which as many components of these layers train as in the whole model."""
        embeddings = {id(p): p.numel() for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
                      if m is not None for p in m.parameters()}  # fmt: skip
        total = sum(p.numel() for p in self.model.parameters())
        return min(1.0, (trained + (sum(embeddings.values()) if self.config.apex.trains == "half" else 0)) / total)

    def forward_and_backward(self, rows: int, length: int) -> dict[str, float]:
        ids = torch.arange(rows * length, device=self.device).view(rows, length) % self.probe.vocabulary
        inputs = {"input_ids": ids, "labels": ids}
        if self.config.packing and (self.config.document_boundaries or self.config.task == "sft"):
            # Two documents a row: attention then takes the way that keeps them apart.
            inputs["position_ids"] = (torch.arange(length, device=self.device) % -(-length // 2)).expand(rows, -1)
        self.sections.mark("begin")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            output = self.model(**inputs, use_cache=False)
            penalty = self.apex.penalty() if self.apex is not None else None
            loss = output.loss if penalty is None else output.loss + penalty
        self.probe.logits = output.logits.numel() * output.logits.element_size()
        self.sections.mark("forward_end")
        loss.backward()
        self.sections.mark("end")
        return self.sections.seconds()

    def update(self) -> dict[str, float]:
        at = self.sections.at
        self.sections.mark("begin")
        if self.apex is not None:
            self.apex.pull_back()
        self.sections.mark("pulled")
        if self.config.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])  # the check for NaN
        self.sections.mark("clipped")
        self.optimizer.step()
        self.sections.mark("applied")
        self.optimizer.zero_grad()
        plain = at["clipped"] - at["pulled"] + at["stepped"] - at["restored"]
        return {"update": plain, "expansion": at["applied"] - at["begin"] - plain}

    @contextlib.contextmanager
    def weighing(self) -> Iterator[None]:
        """Count what autograd saves meanwhile: each piece of memory once, the model's own weights not."""
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        seen = set(own)
        probe = self.probe
        shapes = {frozenset(m.weight.shape) for m in self.model.modules() if isinstance(m, nn.Linear)}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                copied = self.config.bf16 and tensor.dim() == 2 and frozenset(tensor.shape) in shapes
                if copied and self.sections.inside:
                    probe.copied_layers += storage.nbytes()
                elif copied:
                    probe.copied_head += storage.nbytes()
                elif self.sections.inside:
                    probe.saved_layers += storage.nbytes()
                elif tensor.shape[-1:] == (probe.vocabulary,):
                    probe.saved_logits += storage.nbytes()
                else:
                    probe.saved_rest += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def close(self) -> None:
        self.sections.close()


def measure(config: RunConfig, model: PreTrainedModel, *, rows: int, length: int, layers: int, trained: int) -> Probe:
    """Run the copy for a few seconds.

    `rows`, `length`: a micro-batch of the run, in tokens; cut where it would take too long. `trained`: parameters of
    operators and slices in the first `layers` layers (budgets below 100%).
    """
    embedding: Any = model.get_input_embeddings()
    vocabulary = min(embedding.weight.shape[0], max(1, EMBEDDING // embedding.weight.shape[1]))
    probe = Probe(layers, vocabulary, rows, length)
    with torch.random.fork_rng():
        run = _Run(config, model, probe, trained, run_device(model))
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
            with run.weighing():
                run.forward_and_backward(probe.rows, probe.length)
            run.update()
            probe.hidden = run.sections.hidden
            probe.state_bytes = _state_bytes(run.optimizer)
            begun = time.perf_counter()
            times: list[dict[str, float]] = []
            while len(times) < PASSES and (not times or time.perf_counter() - begun < ENOUGH_SECONDS):
                times.append(run.forward_and_backward(probe.rows, probe.length) | run.update())
            for name in times[0]:
                setattr(probe, name, min(t[name] for t in times))
        finally:
            run.close()
    return probe


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
