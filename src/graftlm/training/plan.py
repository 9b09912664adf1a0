"""`graftlm plan`: the estimates of a run as a person reads them."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from graftlm.models import PACKAGED, TINY, load_model, load_tokenizer, quiet_transformers
from graftlm.reporting import figures
from graftlm.training.config import RunConfig
from graftlm.training.control import control_config
from graftlm.training.data import prepare_data
from graftlm.training.estimates import compare_plan, estimate, machine_memory
from graftlm.training.probe import run_device

__all__ = ["compare_plan", "estimate", "plan"]

PREPARED_AT_MOST = 64 * 2**20
"""Bytes of data above which it is not tokenised just to count its sequences."""
BYTES_A_TOKEN = 4
"""Assumed for data that is not tokenised: English text in a vocabulary of some ten thousands."""


def load_skeleton(config: RunConfig) -> PreTrainedModel:
    """The model of a run for its shapes: without weights (on the meta device) where a config.json is all it takes."""
    name, code = config.model, {"trust_remote_code": config.trust_remote_code}
    if name not in (TINY, *PACKAGED) and not name.endswith(".gguf"):
        try:
            with quiet_transformers(), torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    AutoConfig.from_pretrained(name, **code),
                    dtype=getattr(torch, config.dtype),
                    attn_implementation=config.attn_implementation,
                    **code,
                )
                return model
        except (OSError, ValueError, KeyError, ImportError):
            pass  # opening it says in plain words what is wrong
    return load_model(name, dtype=config.dtype, attn_implementation=config.attn_implementation, **code)


def count_sequences(config: RunConfig) -> tuple[int | None, int | None, str]:
    """Sequences and tokens of an epoch, and where the numbers come from. None where nothing is known."""
    if config.max_steps > 0:
        return None, None, "not needed: max_steps is set"
    sizes = [_bytes_of(Path(source.path), source.pattern) for source in config.data]
    if None not in sizes and sum(filter(None, sizes)) <= PREPARED_AT_MOST:
        tokenizer = load_tokenizer(
            config.model, chat_template=config.chat_template, trust_remote_code=config.trust_remote_code
        )
        found = prepare_data(config, tokenizer).statistics
        return found.blocks, found.tokens, "counted (and kept in the cache)"
    if None in sizes:
        return None, None, "unknown: the data is not on this machine; set max_steps to see the whole run"
    tokens = sum(filter(None, sizes)) // BYTES_A_TOKEN
    said = f"assumed: {BYTES_A_TOKEN} bytes a token, full sequences; set max_steps to be exact"
    return max(1, tokens // config.max_length), tokens, said


def _bytes_of(path: Path, pattern: str) -> int | None:
    path = path.expanduser()
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob(pattern) if file.is_file())
    return os.path.getsize(path) if path.is_file() else None


def plan(config: RunConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Print what a run of `config` trains, computes, needs and takes, without training; returns the estimate.

    With a control, `control` in it is the control's. Raises UserError for what `train` would refuse.
    """
    console = console or Console()
    model = load_skeleton(config)
    blocks, tokens, said = count_sequences(config)
    planned = estimate(config, model, blocks, tokens=tokens)
    if config.control:
        starts = [start or 0 for start in planned["stage_starts"]]
        control = dataclasses.replace(control_config(config, starts), output_dir=config.output_dir)
        planned["control"] = estimate(control, model, blocks, tokens=tokens)
    console.print(_table(config, model, planned, blocks, said))
    console.print(Text(f"FLOPs: {planned['flops_formula']}", style="dim"))
    console.print(Text(f"time and activations: measured on {planned['measured_on']}; scaled up", style="dim"))
    console.print(Text("memory: what is alive at that moment; on a CPU malloc may hold on to more", style="dim"))
    for line in _warnings(model, planned):
        console.print(Text(line, style="bold red"))
    for note in planned["notes"]:
        console.print(Text(f"note: {note}"))
    return planned


def _table(config: RunConfig, model: PreTrainedModel, planned: dict[str, Any], blocks: int | None, said: str) -> Table:
    table = Table(show_header=False, title=f"plan: {figures.method_name(config.method)}", title_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", style="dim")
    count, size, duration = figures.count, figures.size, figures.duration
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
    table.add_row("steps", figures.integer(planned["steps"]), "")
    table.add_row("tokens a step", figures.integer(planned["tokens_per_step"]), "padding counted")
    if config.method == "apex":
        starts = ", ".join("?" if start is None else f"{start:,}" for start in planned["stage_starts"])
        table.add_row("stages", str(len(planned["stage_starts"])), f"beginning at step {starts}")
    table.add_section()
    _add_flops(table, planned)
    table.add_section()
    table.add_row("time a step", duration(planned["estimated_step_seconds"]), "measured, see below")
    table.add_row("assessment before", duration(planned["estimated_assessment_seconds"]), "")
    table.add_row("time of training", duration(planned["estimated_seconds"]), "steps and assessment")
    table.add_row("with evaluations", duration(planned["estimated_wall_seconds"]), "without preparing data and saving")
    if control := planned.get("control"):
        both = [planned["estimated_wall_seconds"], control["estimated_wall_seconds"]]
        table.add_row("control", duration(control["estimated_wall_seconds"]), "plain training, the same tokens")
        table.add_row("together", duration(None if None in both else sum(both)), "")
    table.add_section()
    table.add_row("peak memory", size(planned["estimated_peak_memory_bytes"]), f"in {planned['memory_peak_at']}")
    for name, value in planned["memory"].items():
        table.add_row(f"  {name}", size(value), "")
    if control:
        table.add_row("  of the control", size(control["estimated_peak_memory_bytes"]), "in a process of its own")
    return table


def _add_flops(table: Table, planned: dict[str, Any]) -> None:
    flops = planned["flops"]
    table.add_row("FLOPs a step", _scaled(planned["flops_per_step"]), "the formula is below")
    table.add_row("  operators", _scaled(flops["operators"]), f"{flops['operators'] / planned['flops_per_step']:.2%}")
    if flops["recomputed"]:
        table.add_row("  recomputed", _scaled(flops["recomputed"]), "gradient checkpointing; not in the sum")
    rate = planned["flops_per_step"] / planned["estimated_step_seconds"]
    table.add_row("  a second", _scaled(rate), "what the estimate of time comes to")


def _scaled(value: float) -> str:
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}FLOP"
    return f"{value:.3g} FLOP"


def _warnings(model: PreTrainedModel, planned: dict[str, Any]) -> list[str]:
    there = machine_memory(run_device(model))
    return [
        f"{what} does not fit: it needs about {figures.size(needed)}, this machine has {figures.size(there)}; lower "
        "per_device_train_batch_size (raise gradient_accumulation_steps instead), or set gradient_checkpointing: true"
        for what, needed in (
            ("the run", planned["estimated_peak_memory_bytes"]),
            ("the control", planned.get("control", {}).get("estimated_peak_memory_bytes", 0)),
        )
        if needed > there
    ]
