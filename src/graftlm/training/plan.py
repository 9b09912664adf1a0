"""`graftlm plan`: the estimates of a run as a person reads them."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftlm.errors import UserError
from graftlm.models import check_context, load_model, load_skeleton, load_tokenizer
from graftlm.reporting import figures
from graftlm.training.arguments import check_settings
from graftlm.training.config import RunConfig
from graftlm.training.control import control_config
from graftlm.training.data import prepare_data
from graftlm.training.estimates import estimate, remedies
from graftlm.training.layout import run_device
from graftlm.training.memory import fits_gpu, machine_memory

PREPARED_AT_MOST = 64 * 2**20
"""Bytes of data above which it is not tokenised just to count its sequences."""
BYTES_A_TOKEN = 4
"""Assumed for data that is not tokenised: English text in a vocabulary of some ten thousands."""


def model_for_shapes(config: RunConfig) -> PreTrainedModel:
    """The model of a run for its shapes: without weights (on the meta device) where a config.json is all it takes."""
    model = load_skeleton(config.model, **config.opened_with)
    return model if model is not None else load_model(config.model, **config.opened_with)


class Sequences(NamedTuple):
    """What is known of a run's data; None where nothing is."""

    said: str
    """Where the numbers come from."""
    blocks: int | None = None
    """Sequences of an epoch."""
    evaluation_blocks: int | None = None
    """Sequences evaluated each time."""
    padded_length: float | None = None
    """Tokens of a row, on average, as micro-batches are padded."""
    longest: int | None = None
    """Tokens of the longest sequence."""


def count_sequences(config: RunConfig) -> Sequences:
    """Count where that is needed and the data are small; else assume, or leave it unknown."""
    if config.max_steps > 0 and config.packing:
        elsewhere = [source.path for source in config.data if not Path(source.path).expanduser().exists()]
        where = f"; {elsewhere[0]} is not on this machine" if elsewhere else ""
        return Sequences(f"not needed: max_steps is set{where}")
    sizes = [_bytes_of(Path(source.path), source.pattern) for source in config.data]
    small = None not in sizes and sum(filter(None, sizes)) <= PREPARED_AT_MOST
    if small and (tokenizer := _tokenizer(config)) is not None:
        found = prepare_data(config, tokenizer).statistics
        told = (found.blocks, found.evaluation_blocks, found.padded_length, found.longest)
        return Sequences("counted (and kept in the cache)", *told)
    if config.max_steps > 0:
        return Sequences("not needed: max_steps is set; full sequences are assumed")
    if None in sizes:
        return Sequences("unknown: the data is not on this machine; set max_steps to see the whole run")
    tokens = sum(filter(None, sizes)) // BYTES_A_TOKEN
    said = f"assumed: {BYTES_A_TOKEN} bytes a token, full sequences; set max_steps to be exact"
    return Sequences(said, max(1, tokens // config.max_length))


def _tokenizer(config: RunConfig) -> PreTrainedTokenizerBase | None:
    """None where `model` is a folder with nothing but a config.json, which is enough for a plan."""
    folder = Path(config.model).expanduser()
    if folder.is_dir() and {file.suffix for file in folder.iterdir()} <= {".json"}:
        with contextlib.suppress(UserError):
            return load_tokenizer(config.model, chat_template=config.chat_template)
        return None
    return load_tokenizer(config.model, chat_template=config.chat_template, trust_remote_code=config.trust_remote_code)


def _bytes_of(path: Path, pattern: str) -> int | None:
    path = path.expanduser()
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob(pattern) if file.is_file())
    return os.path.getsize(path) if path.is_file() else None


def plan(config: RunConfig, *, gpus: int | None = None, console: Console | None = None) -> dict[str, Any]:
    """Print what a run of `config` trains, computes, needs and takes, without training; returns the estimate.

    `gpus`: plan for so many, there or not; None: for this machine and the launcher's processes. With a control,
    `control` in it is the control's. Raises UserError for what `train` would refuse.
    """
    console = console or Console(quiet=os.environ.get("RANK", "0") != "0")
    check_settings(config)
    model = model_for_shapes(config)
    too_long = check_context(model, config.max_length)
    found = count_sequences(config)
    known: dict[str, Any] = {
        "evaluation_blocks": found.evaluation_blocks,
        "padded_length": found.padded_length,
        "longest": found.longest,
        "gpus": gpus,
    }
    planned = estimate(config, model, found.blocks, **known)
    if config.control:
        starts = [start or 0 for start in planned["stage_starts"]]
        control = dataclasses.replace(control_config(config, starts), output_dir=config.output_dir)
        planned["control"] = estimate(control, model, found.blocks, **known)
    console.print(_table(config, model, planned, found.blocks, found.said))
    console.print(Text(f"FLOPs: {planned['flops_formula']}", style="dim"))
    for line in _assumptions(config, planned):
        console.print(Text(line, style="dim"))
    better = sorted(planned["peak_memory_with"].items(), key=lambda item: item[1])
    if offers := [f"{figures.size(v)} with {k}" for k, v in better if v < planned["estimated_peak_memory_bytes"]]:
        console.print(Text(f"less memory: {', '.join(offers)}", style="dim"))
    for line in _warnings(model, planned):
        console.print(Text(line, style="bold red"))
    for note in [*planned["notes"], *([too_long] if too_long else [])]:
        console.print(Text(f"note: {note}"))
    return planned


def _table(config: RunConfig, model: PreTrainedModel, planned: dict[str, Any], blocks: int | None, said: str) -> Table:
    spread = planned["layout"]
    units = "" if _alone(planned) else f" on {_units(planned, spread['processes'])} ({spread['strategy']})"
    table = Table(show_header=False, title=f"plan: {figures.method_name(config.method)}{units}", title_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", style="dim")
    count, size = figures.count, figures.size
    table.add_row("model", config.model, f"{type(model).__name__}, weights in {config.dtype}")
    table.add_row("parameters", count(planned["total_parameters"]), "")
    table.add_row(
        "trainable",
        count(planned["trainable_parameters"]),
        f"{planned['trainable_fraction']:.2%} of all" + (", operators included" if config.method == "apex" else ""),
    )
    if config.method == "apex":
        table.add_row("of these, operators", count(planned["operator_parameters"]), config.apex.operator)
        for kind, share in planned["effective_k"].items():
            table.add_row(f"K of {kind}", f"{share:.2%}", "in P, and as many in N")
    table.add_section()
    table.add_row("sequences an epoch", figures.integer(blocks), said)
    if spread["processes"] > 1:
        table.add_row("steps an epoch", figures.integer(planned["steps_per_epoch"]), "of all together")
    table.add_row("steps", figures.integer(planned["steps"]), "")
    shared = "" if _alone(planned) else f", {figures.integer(planned['tokens_per_step'] / spread['processes'])} each"
    table.add_row("tokens a step", figures.integer(planned["tokens_per_step"]), f"padding counted{shared}")
    if config.method == "apex":
        starts = ", ".join("?" if start is None else f"{start:,}" for start in planned["stage_starts"])
        table.add_row("stages", str(len(planned["stage_starts"])), f"beginning at step {starts}")
    table.add_section()
    _add_flops(table, planned)
    table.add_section()
    _add_times(table, planned)
    table.add_section()
    table.add_row("peak memory", size(planned["estimated_peak_memory_bytes"]), _peak_of(planned))
    for name, value in planned["memory"].items():
        table.add_row(f"  {name}", size(value), "")
    if control := planned.get("control"):
        table.add_row("  of the control", size(control["estimated_peak_memory_bytes"]), "in a process of its own")
    if sent := {name: value for name, value in planned["sent_bytes_per_step"].items() if value}:
        total = sum(sent.values())
        table.add_section()
        table.add_row("sent a step", size(total), f"by each {_units(planned, 1)}")
        for name, value in sent.items():
            table.add_row(f"  {name}", size(value), figures.small_share(value / total))
    return table


def _alone(planned: dict[str, Any]) -> bool:
    return planned["layout"]["processes"] == 1 and not planned["layout"]["assumed"]


def _units(planned: dict[str, Any], count: int) -> str:
    unit = "GPU" if planned["layout"]["device"] == "cuda" else "process"
    return unit if count == 1 else f"{count} {unit}{'s' if unit == 'GPU' else 'es'}"


def _peak_of(planned: dict[str, Any]) -> str:
    return ("" if _alone(planned) else f"of each {_units(planned, 1)}, ") + f"in {planned['memory_peak_at']}"


def _assumptions(config: RunConfig, planned: dict[str, Any]) -> list[str]:
    """What the figures rest on, in short."""
    spread = planned["layout"]
    what = "activations" if spread["assumed"] else "time and activations"
    lines = [f"{what}: measured on {planned['measured_on']}; scaled up"]
    if spread["device"] != "cuda":
        lines.append("memory: what is alive at that moment; on a CPU malloc may hold on to more")
    else:
        lines.append("memory: tensors; CUDA, NCCL and gaps between tensors take more (leave 10% and 2 GiB)")
    if spread["assumed"]:
        kind = "bfloat16" if config.bf16 or config.dtype == "bfloat16" else "float32 (bf16: true needs less)"
        attention = config.attn_implementation or "sdpa"
        lines.append(
            f"no GPU here: a GPU is taken to keep for the backward pass what this CPU keeps, in {kind}, attention by "
            f"{attention}" + (", without a table of T x T" if attention == "sdpa" else "") + "; time is not estimated"
        )
    if spread["processes"] > 1:
        lines.append(
            "sent: counted as in a ring, (n - 1) / n of what is gathered or scattered and twice that of what is summed "
            "for all" + ("" if spread["assumed"] else "; not in the time")
        )
    return lines


def _add_times(table: Table, planned: dict[str, Any]) -> None:
    duration = figures.duration
    if planned["layout"]["assumed"]:
        table.add_row("time", figures.MISSING, "not known without a GPU")
        return
    table.add_row("time a step", duration(planned["estimated_step_seconds"]), "measured, see below")
    table.add_row("assessment before", duration(planned["estimated_assessment_seconds"]), "")
    table.add_row("time of training", duration(planned["estimated_seconds"]), "steps and assessment")
    table.add_row("with evaluations", duration(planned["estimated_wall_seconds"]), "without preparing data and saving")
    if control := planned.get("control"):
        both = [planned["estimated_wall_seconds"], control["estimated_wall_seconds"]]
        table.add_row("control", duration(control["estimated_wall_seconds"]), "plain training, the same tokens")
        table.add_row("together", duration(None if None in both else sum(both)), "")


def _add_flops(table: Table, planned: dict[str, Any]) -> None:
    flops = planned["flops"]
    table.add_row("FLOPs a step", _scaled(planned["flops_per_step"]), "the formula is below")
    own, share = flops["operators"], flops["operators"] / planned["flops_per_step"]
    table.add_row(
        "  operators" if planned["operator_parameters"] else "  the method's own", _scaled(own), f"{share:.2%}"
    )
    if flops["recomputed"]:
        table.add_row("  recomputed", _scaled(flops["recomputed"]), "gradient checkpointing; not in the sum")
    if seconds := planned["estimated_step_seconds"]:
        processes = planned["layout"]["processes"]
        rate = planned["flops_per_step"] / seconds / processes
        each = "" if processes == 1 else f", each {_units(planned, 1)}"
        table.add_row("  a second", _scaled(rate), f"what the estimate of time comes to{each}")


def _scaled(value: float) -> str:
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}FLOP"
    return f"{value:.3g} FLOP"


def _warnings(model: PreTrainedModel, planned: dict[str, Any]) -> list[str]:
    if planned["layout"]["assumed"]:
        return []
    there = machine_memory(run_device(model))
    if planned["layout"]["device"] == "cpu":
        there //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_gpu = planned["layout"]["device"] == "cuda"
    return [
        f"{what} {'does not fit' if peak > there else 'may not fit'}: this machine has {figures.size(there)}"
        f"{remedies(estimated)}"
        for what, estimated in (("the run", planned), ("the control", planned.get("control")))
        if estimated
        and ((peak := estimated["estimated_peak_memory_bytes"]) > there or (on_gpu and not fits_gpu(peak, there)))
    ]
