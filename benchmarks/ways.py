"""Ways of training to compare, each as one optimizer step at a time: the same model, loop, optimizer and batches."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback
from turns import Turn, synchronize

from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.expansion import Mixed
from graftlm.models import load_model
from graftlm.ties import Piece

LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-5, 0.1, 1.0
BATCHES = 4

# Llama's shapes, with random weights: hidden size, FFN channels, layers, heads, key-value heads, vocabulary.
SHAPES = {
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1.1b": (2048, 5632, 22, 32, 4, 32000),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_model(options: argparse.Namespace) -> PreTrainedModel:
    """`options.model`: one of SHAPES, or what load_model takes."""
    dtype = getattr(torch, options.dtype)
    model: Any
    if options.model in SHAPES:
        hidden, channels, layers, heads, groups, vocabulary = SHAPES[options.model]
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=channels,
            num_hidden_layers=options.layers or layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            vocab_size=vocabulary,
            max_position_embeddings=options.length,
            tie_word_embeddings=options.model == "135m",
        )
        with torch.device(device()):
            model = LlamaForCausalLM._from_config(config, dtype=dtype)
    else:
        model = load_model(options.model, dtype=options.dtype).to(device())
    model.config.use_cache = False
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def batches(model: PreTrainedModel, options: argparse.Namespace) -> list[Tensor]:
    """Random tokens, [rows, length] each, the same for every way."""
    generator = torch.Generator().manual_seed(1)
    shape = (options.rows, options.length)
    size = model.config.vocab_size
    return [torch.randint(size, shape, generator=generator).to(device()) for _ in range(BATCHES)]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


def loop(
    model: Any,
    optimizer: torch.optim.Optimizer,
    options: argparse.Namespace,
    turn: Turn,
    before_clipping: Callable[[], None] = lambda: None,
    after_step: Callable[[], None] = lambda: None,
    note: Callable[[], dict[str, float]] = dict,
) -> None:
    """The loop that all ways share: backward passes, clip, step, zero."""
    inputs = batches(model, options)
    trained = [p for p in model.parameters() if p.requires_grad]
    for step in turn.steps():
        for micro in range(options.accumulation):
            ids = inputs[(step * options.accumulation + micro) % len(inputs)]
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=options.autocast):
                loss = model(input_ids=ids, labels=ids).loss
            (loss / options.accumulation).backward()
        before_clipping()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        after_step()
        optimizer.zero_grad()
        turn.noted = note()


def plain(options: argparse.Namespace, turn: Turn) -> None:
    """Plain training of everything, in a bare PyTorch loop."""
    model = build_model(options)
    optimizer = optimizer_of(model)
    turn.ready(trainable=sum(p.numel() for p in model.parameters()))
    loop(model, optimizer, options, turn)


class Stopwatch:
    """Seconds inside wrapped functions, the GPU's work included."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any, **kwargs: Any) -> None:
            synchronize()
            begin = time.perf_counter()
            function(*args, **kwargs)
            synchronize()
            self.seconds += time.perf_counter() - begin

        return timed

    def take(self) -> float:
        """Seconds since it was last asked."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def apex(options: argparse.Namespace, turn: Turn, assess: bool = True) -> None:
    """APEX in the full regime; with options.spans, each step says how long its parts took."""
    model = build_model(options)
    bound = Apex(model, ApexConfig(stages=1))
    if not assess:
        bound.recorder.due = lambda: False
    watch = Stopwatch()
    if options.spans:
        # The optimizer's hooks look these up when Apex starts. Waiting for a GPU here would cost what is measured.
        bound._before_step = watch.around(bound._before_step)  # type: ignore[method-assign]
        bound._after_step = watch.around(bound._after_step)  # type: ignore[method-assign]
        bound.pull_back = watch.around(bound.pull_back)  # type: ignore[method-assign]
    optimizer = optimizer_of(model)
    bound.start(optimizer, assess_on=[{"input_ids": batches(model, options)[0]}])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    turn.ready(trainable=trainable, parameters=bound.budget.total, operators=bound.operator_parameters)
    loop(model, optimizer, options, turn, bound.pull_back, note=lambda: {"span_seconds": watch.take()})


class _Concatenated(nn.Module):
    """W~ as the authors' code builds it: parts of the weight concatenated anew in every forward pass."""

    def __init__(self, parts: list[Mixed], size: int, dim: int):
        super().__init__()
        self._parts, self._dim = parts, dim
        self._orders = []
        for mixed in parts:
            placed = mixed.expansion.placed(mixed.piece)
            n = placed.n.flat
            rest = torch.ones(size, dtype=torch.bool, device=n.device).index_fill(0, n, False).nonzero()[:, 0]
            self._orders.append((rest, n, placed.p.flat, torch.cat([rest, n]).argsort()))

    def forward(self, raw: Tensor) -> Tensor:
        for mixed, (rest, n, p, order) in zip(self._parts, self._orders, strict=True):
            slots, k = mixed.piece.matrix.slots, mixed.tie.k
            panel = raw[p].view(slots, k, -1) if self._dim == 0 else raw[:, p].view(-1, slots, k).permute(1, 2, 0)
            added = torch.stack([mixed.tie.operator(slot.to(mixed.tie.dtype)) for slot in panel]).to(raw.dtype)
            if self._dim == 0:
                raw = torch.cat([raw[rest], raw[n] + added.view(len(n), *raw.shape[1:])])[order]
            else:
                raw = torch.cat([raw[:, rest], raw[:, n] + added.permute(2, 0, 1).flatten(1)], 1)[:, order]
        return raw


def by_autograd(options: argparse.Namespace, turn: Turn, concatenate: bool) -> None:
    """Expansion by plain autograd: the oracle (M written out), or concatenating as the authors' code does."""
    from graftlm.reference import ReferenceExpansion

    model = build_model(options)
    bound = Apex(model, ApexConfig(stages=1, assessment="random"))
    bound.start(optimizer_of(model))
    expansions, ties = bound.expansions, nn.ModuleList(bound.ties)
    stages = [(e.block, e.ties, e.choice) for e in expansions]
    mixed = [m for e in expansions for m in e.mixed()]
    for expansion in expansions:
        for m in expansion.mixed():
            expansion.placed(m.piece)
    for handle in [*bound._handles, *bound._model_handles]:
        handle.remove()
    bound.recorder.close()
    del model.apex
    if concatenate:
        by_name: dict[str, list[Mixed]] = {}
        for m in mixed:
            by_name.setdefault(m.piece.name, []).append(m)
        for name, parts in by_name.items():
            module, _, kind = name.rpartition(".")
            piece: Piece = parts[0].piece
            size = model.get_parameter(name).shape[piece.dim]
            built = _Concatenated(parts, size, piece.dim)
            parametrize.register_parametrization(model.get_submodule(module), kind, built, unsafe=True)
    else:
        ReferenceExpansion(model, stages)  # type: ignore[arg-type]
    model.add_module("ties", ties)
    optimizer = optimizer_of(model)
    turn.ready(trainable=sum(p.numel() for p in model.parameters()))
    loop(model, optimizer, options, turn)


class _InTurn(TrainerCallback):
    """Lets a Trainer take one step at a time."""

    def __init__(self, turn: Turn):
        self._turn = turn
        self._steps = turn.steps()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._turn.ready()
        next(self._steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if next(self._steps, None) is None:
            control.should_training_stop = True


def trainer(options: argparse.Namespace, turn: Turn) -> None:
    """graftlm's trainer, plain training: what it adds to the bare loop (data, checks, metrics, schedule)."""
    from graftlm.training.arguments import training_arguments
    from graftlm.training.config import RunConfig, SourceConfig
    from graftlm.training.metrics import Display, MetricsLog
    from graftlm.training.run_trainer import RunTrainer

    model = build_model(options)
    rows = [{"input_ids": row, "labels": row} for batch in batches(model, options) for row in batch.cpu()]
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            model=options.model,
            data=(SourceConfig("none"),),
            output_dir=folder,
            method="full",
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            per_device_train_batch_size=options.rows,
            gradient_accumulation_steps=options.accumulation,
            max_steps=10**6,
            optim="adamw_torch_fused",
            bf16=options.autocast,
            gradient_checkpointing=options.checkpointing,
        )
        made = RunTrainer(
            model=model,
            args=training_arguments(config),
            train_dataset=rows,
            run=Path(folder),
            evaluation=None,
            evaluation_batch_size=1,
            display=Display("trainer"),
        )
        made.metrics = MetricsLog(Path(folder) / "metrics.jsonl")
        made.add_callback(_InTurn(turn))
        made._save_checkpoint = lambda *_: None  # type: ignore[method-assign]
        made.train()


WAYS: dict[str, Callable[[argparse.Namespace, Turn], None]] = {
    "plain": plain,
    "apex": apex,
    "unassessed": lambda options, turn: apex(options, turn, assess=False),
    "oracle": lambda options, turn: by_autograd(options, turn, concatenate=False),
    "concatenated": lambda options, turn: by_autograd(options, turn, concatenate=True),
    "trainer": trainer,
}


def way(name: str, options: argparse.Namespace, turn: Turn) -> None:
    WAYS[name](options, turn)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of steps can be told."""
    parser.add_argument("--model", default="smollm2", help=f"what `model:` takes, or a shape: {', '.join(SHAPES)}")
    parser.add_argument("--rows", type=int, default=4, help="sequences a forward pass")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--accumulation", type=int, default=1, help="forward passes a step")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="what weights are held in")
    parser.add_argument(
        "--autocast", action=argparse.BooleanOptionalAction, help="compute in bfloat16 with weights in float32"
    )
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for all ways")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, to try a benchmark out")
    parser.add_argument("--budget", type=float, help="trainable share of the small regime")
    parser.add_argument("--rounds", type=int, default=7, help="counted steps of each way, after one that is not")
    parser.add_argument("--out", help="write the result to this JSON file too")
    parser.set_defaults(spans=False, autocast=False)
