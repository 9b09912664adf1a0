"""`graftlm prune`: from the name of a model to a folder that holds it pruned, and a screenful on what was done."""

import glob
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from graftlm.configuring import load_sources
from graftlm.errors import UserError
from graftlm.files import check_whole_folder, remove_unfinished, without_link
from graftlm.fused_loss import fused_where_it_fits
from graftlm.held_out import mean_loss
from graftlm.models import check_vocabulary, load_model, load_skeleton, load_tokenizer, to_gpu
from graftlm.parts import layer_parameters
from graftlm.progress import step_bar
from graftlm.pruning.base import Pruned, PruneStep
from graftlm.pruning.calibration import TextCalibration, calibration_from
from graftlm.pruning.checks import check
from graftlm.pruning.notes import notes_on, unused
from graftlm.pruning.prune import prune
from graftlm.pruning.saving import SUMMARY, save_pruned
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.ways import calibration_in_words, has_control
from graftlm.reporting.pruning import write_report

ROWS = 8
"""Of the table of layers."""
LINES = 10
"""Of progress, at most, where there is no terminal."""
OWN_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", SUMMARY),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "*.tiktoken", "chat_template.jinja", "additional_chat_templates"),
    *("*modeling*.py", "*configuration*.py", "*tokenization*.py"),
    *("README.md", "report.html", "plots"),
)
"""What a pruned model's folder holds: weights, configs, tokenizer, class, card and report."""


def run_prune(
    model_name: str,
    settings: PruneSettings,
    data: Sequence[str],
    out: str | Path,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Pruned:
    """Prune the model called `model_name` and write it to the folder `out`, whole or not at all.

    data: what importance is measured on, each as load_sources takes it; none: the demo's text. On a GPU where there is
    one.

    Raises UserError where the model, the data, the target or `out` will not do; a folder that holds anything but an
    earlier pruned model is never replaced.
    """
    out = Path(out)
    if out.exists() and out.resolve() == Path(model_name).resolve():
        raise UserError(f"prune: --out {out} is the model's own folder; name another")
    check_out(out)
    sources = [source for named in data for source in load_sources(named)]
    tokenizer = load_tokenizer(model_name, trust_remote_code=trust_remote_code)
    skeleton = load_skeleton(model_name, trust_remote_code=trust_remote_code)
    if skeleton is not None:  # before data and weights are read
        check(skeleton, settings)
    calibration = calibration_from(tokenizer, settings, sources, progress=progress)
    model = load_model(model_name, dtype=dtype, trust_remote_code=trust_remote_code)
    check_vocabulary(model, tokenizer)
    to_gpu(model)
    before, layers = _loss(model, calibration), layer_parameters(model)
    with _Bar(settings.method, progress) as bar:
        pruned = prune(model, settings, calibration, bar.step)
    after = _loss(pruned.model, calibration)
    pruned = replace(pruned, notes=notes_on(pruned, calibration.notes))
    where = ", ".join(source.path for source in sources) if data else "the demo's text"
    measured = {
        "held_out_sequences": len(calibration.held_back),
        "held_out_length": calibration.length,
        "held_out_loss_before": before,
        "held_out_loss": after,
        "layer_parameters": layer_parameters(pruned.model),
        "original_layer_parameters": layers,
    }
    save_pruned(pruned, tokenizer, out, base_model=model_name, data=where, extra=measured)
    report = write_report(out)
    _print(pruned, calibration, layers, before, after)
    _print_end(pruned, model_name, data, out, report, trust_remote_code=trust_remote_code)
    return pruned


def check_out(out: Path) -> None:
    """Raise UserError where `out` is anything but new, empty, or a pruned model and nothing else (which is replaced),
    or cannot be written. What a killed process left of writing it is removed, and what it had moved aside is put
    back."""
    real = without_link(out)
    remove_unfinished(real.parent, glob.escape(real.name))
    check_whole_folder(out)
    if out.is_dir() and not ((out / SUMMARY).is_file() or not any(out.iterdir())):
        raise UserError(f"{out}: is there and is no pruned model (no {SUMMARY}); give another --out, or delete it")
    if out.is_dir():
        ours = {path for pattern in OWN_FILES for path in out.glob(pattern)}
        if others := sorted(path.name for path in out.iterdir() if path not in ours):
            raise UserError(
                f"{out}: holds {others[0]} beside a pruned model, which would be deleted with it; move it away, or "
                "give another --out"
            )


def _loss(model: PreTrainedModel, calibration: TextCalibration) -> float | None:
    """Mean over the tokens held back, in nats; None where there are none, or where it is no number."""
    with fused_where_it_fits(model):
        loss = mean_loss(model, calibration.held_out())
    return loss if math.isfinite(loss) else None


class _Bar:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, title: str, shown: bool):
        self._console = Console(stderr=True)
        self._shown = shown
        self._progress = step_bar(self._console, shown=shown)
        self._task = self._progress.add_task(title, total=None, figures="")
        self._title = title

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def step(self, step: PruneStep) -> None:
        figures = f"{step.parameters:,} parameters  {step.seconds:.2f} s"
        self._progress.update(self._task, completed=step.iteration, total=step.iterations, figures=figures)
        due = step.iteration % -(-step.iterations // LINES) == 0 or step.iteration == step.iterations
        if self._shown and due and not self._console.is_terminal:
            line = f"{self._title}  {step.iteration}/{step.iterations}  {figures}"
            self._console.print(line, highlight=False, soft_wrap=True)


# --- what is printed -------------------------------------------------------------------------------------------------


def _print(
    pruned: Pruned, calibration: TextCalibration, layers: list[int], before: float | None, after: float | None
) -> None:
    console = Console()
    console.print(_table(pruned, layers))
    removed = 1 - pruned.parameters / pruned.original_parameters
    lines = [
        f"parameters {pruned.original_parameters:,} -> {pruned.parameters:,} ({removed:.1%} fewer, embeddings counted)"
    ]
    lines.append(f"{pruned.seconds:.1f} s, on {calibration_in_words(pruned.settings)}")
    held = f"{len(calibration.held_back)} sequences of {calibration.length} tokens held back"
    lines.append(
        f"no loss measured: {'it is not finite' if calibration.held_back else 'too few sequences to hold any back'}"
        if before is None
        else f"loss {before:.4f} -> {'not finite' if after is None else f'{after:.4f}'} nats a token, on {held}"
    )
    for line in (*lines, *(f"note: {note}" for note in pruned.notes)):
        console.print(Text(line), soft_wrap=True)


def _table(pruned: Pruned, layers: list[int]) -> Table:
    """What is left of ranges of layers, of about the same length."""
    now = layer_parameters(pruned.model)
    table = Table(header_style="bold")
    for name in ("layers", "key-value groups", "channels", "parameters", "of before"):
        table.add_column(name, overflow="fold")
    if len(now) != len(layers) or not pruned.shapes:  # whole layers went
        table.add_row(f"{len(layers)} -> {len(now)}", "", "", f"{sum(now):,}", f"{sum(now) / sum(layers):.1%}")
        return table
    size = -(-len(now) // ROWS)
    for first in range(0, len(now), size):
        some = slice(first, first + size)
        kept, left, had = pruned.shapes[some], sum(now[some]), sum(layers[some])
        groups = _range([shape.num_key_value_heads for shape in kept])
        channels = _range([shape.intermediate_size for shape in kept])
        last = first + len(kept) - 1
        name = str(first) if last == first else f"{first}-{last}"
        table.add_row(name, groups, channels, f"{left:,}", f"{left / had:.1%}")
    return table


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _print_end(
    pruned: Pruned, model_name: str, data: Sequence[str], out: Path, report: Path, *, trust_remote_code: bool
) -> None:
    """What to do next; beside an adaptive model its control always belongs."""
    console = Console()
    console.print(Text(f"written to {out}; plots in {report}"), soft_wrap=True)
    if len(set(pruned.shapes)) > 1 and has_control(pruned.settings):
        words = ["graftlm", "prune", model_name, "--target-parameters", str(pruned.parameters), "--uniform"]
        words += ["--method", pruned.settings.method]
        words += [word for named in data for word in ("--data", named)]
        words += ["--dtype", "bfloat16"] if pruned.model.dtype == torch.bfloat16 else []
        words += ["--trust-remote-code"] if trust_remote_code else []
        words += ["--out", f"{out}-uniform", *_same_settings(pruned.settings)]
        command = shlex.join(words)
        console.print(Text(f"compare it with its uniform control: {command}"), soft_wrap=True)


def _same_settings(settings: PruneSettings) -> list[str]:
    """Words that give the uniform control the other settings, where they are not the defaults and it reads them."""
    own = ("method", "sparsity", "target_parameters", "uniform", "exact", "preset")
    default = PruneSettings(sparsity=settings.sparsity, target_parameters=settings.target_parameters)
    idle = unused(replace(settings, uniform=True, preset=None))
    given = ((name, value) for name, value in asdict(settings).items() if name not in (*own, *idle))
    return [f"{name}={value}" for name, value in given if value != getattr(default, name)]
