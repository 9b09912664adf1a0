"""`graftlm assess`: how active each head and channel of a model is on data, and what the model is without some.

A sample is one conversation, or one document (of long ones, each piece of at most max_length tokens): samples are never
packed together, and padding is never counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.numpy import save_file
from torch import Tensor
from transformers import PreTrainedModel

from graftlm.activations import ActivationRecorder, count_tokens
from graftlm.advantage import Choice, choose, count_of, set_size, sets_fit
from graftlm.anatomy import Anatomy, Kind, read_anatomy
from graftlm.apex_config import ApexConfig
from graftlm.configuring import load_sources
from graftlm.environment import describe_environment
from graftlm.errors import UserError
from graftlm.files import atomic_path, check_folder, write_json
from graftlm.models import check_vocabulary, load_model, load_tokenizer, to_gpu
from graftlm.pruning.sensitivity import layer_sensitivity, loss_without
from graftlm.reporting import figures
from graftlm.reporting.distributions import plot_activations, plot_sigma, relative_sigma, sigma, strongest_of, top_share
from graftlm.reporting.layers import plot_sensitivity
from graftlm.reporting.spaces import mean_by_role, plot_spaces
from graftlm.reporting.table import wide
from graftlm.subspaces import read_subspaces
from graftlm.training.config import RunConfig
from graftlm.training.data import PreparedData, prepare_data

LOGITS_A_PASS = 2**27
"""Logits of one forward pass at most: 512 MiB in float32. One sequence may have more."""
SAMPLE = (
    "one conversation, or one document (a longer one: each piece of max_length tokens); never packed together, "
    "padding never counted"
)

RUN_FILES = ("summary.json", "config.yaml", "phases.json", "pruning.json", "config.json")
"""What says that a folder is a run's, or a model's."""


@dataclass
class Assessed:
    """What was seen of one model."""

    label: str
    samples: int
    tokens: int
    k: Mapping[Kind, float]
    activations: dict[str, dict[int, np.ndarray]]
    """{kind: {layer: float32 [ranked]}}: mean over samples of the squared norm."""
    layers: dict[str, dict[str, Any]]
    notes: list[str]
    choices: dict[str, Choice]
    subspaces: dict[str, dict[str, Any]]
    """{block: {role: Subspaces}}, of the first model's P and N where this one has the same blocks."""
    masking: dict[str, Any] | None = None
    sensitivity: dict[str, Any] | None = None
    """pruning.sensitivity.layer_sensitivity."""
    data_notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("activations", "choices")}


def assess(
    model: str,
    data: str,
    out: Path,
    *,
    compare: str | None = None,
    samples: int = 256,
    max_length: int = 1024,
    mask: float | None = None,
    prune_sensitivity: float | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Path:
    """Assess `model` (and `compare`) on `samples` sequences of `data` (what load_sources takes), spread evenly over it,
    on the GPU where there is one; returns `out`. `dtype`: of the weights.

    Writes activations.safetensors (LABEL/KIND/LAYER: float32 [heads or channels]), assessment.json and plots/*.png, and
    prints a table. `mask`: share of the heads and of the channels of each block that are switched off together: the
    strongest, the weakest, random ones; the loss without them is measured on other sequences of the data where there
    are any. P and N are drawn up for K = `mask`, as far as they can be, else for the default K. `prune_sensitivity`:
    share of the key-value groups and channels of one layer at a time, the least important to pruning, without which
    the loss is measured on those other sequences.

    Raises UserError for models and data that cannot be opened or assessed, and first for an `out` that cannot be
    written; `out` then has no assessment.json.
    """
    check_folder(out)
    if any((Path(out) / name).exists() for name in RUN_FILES):
        raise UserError(f"{out}: holds a run, whose files would be written over; give another --out")
    names = [model] if compare is None else [model, compare]
    labels = names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names, 1)]
    found: list[Assessed] = []
    for name, label in zip(names, labels, strict=True):
        of_first = found[0].choices if found else None
        settings = (samples, max_length, mask, prune_sensitivity)
        found.append(_assess_one(name, label, data, *settings, of_first, dtype, trust_remote_code))
    out = Path(out)
    _save_activations(out / "activations.safetensors", found)
    plots = _plot(out / "plots", found)
    result = {
        "data": data,
        "sample": SAMPLE,
        "max_length": max_length,
        "models": [one.as_json() for one in found],
        "environment": describe_environment(),
    }
    write_json(out / "assessment.json", result)
    _print(found, [out / "assessment.json", *plots])
    return out


def _assess_one(
    name: str,
    label: str,
    data: str,
    samples: int,
    max_length: int,
    mask: float | None,
    prune_sensitivity: float | None,
    choices: dict[str, Choice] | None,
    dtype: str,
    trust_remote_code: bool,
) -> Assessed:
    """`choices`: P and N whose subspaces are measured; None: the model's own."""
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    # Not packed: a sample is then a row.
    config = RunConfig(name, load_sources(data), packing=False, eval_fraction=0.0, max_length=max_length)
    prepared = prepare_data(config, tokenizer)
    model = to_gpu(load_model(name, dtype=dtype, trust_remote_code=trust_remote_code))
    check_vocabulary(model, tokenizer)
    anatomy = read_anatomy(model)
    defaults = ApexConfig()
    shares: dict[Kind, float] = {"heads": defaults.k_heads, "channels": defaults.k_channels}
    if mask is not None:
        shares |= {
            kind: mask for kind in anatomy.kinds if all(sets_fit(block, mask) for block in anatomy.of_kind(kind))
        }
    chosen, others = choose_sequences(len(prepared.train), samples)  # type: ignore[arg-type]
    recorder = ActivationRecorder(model, anatomy, shares)
    tokens = 0

    def counted() -> Iterator[dict[str, Tensor]]:
        nonlocal tokens
        for batch in _batches(prepared, chosen, model):
            tokens += int(count_tokens(batch))
            yield batch

    seen = recorder.run(counted())
    recorder.close()
    means = {
        kind: {i: m.float().numpy() for i, m in layers.items()} for kind, layers in recorder.mean_activations().items()
    }
    if not all(np.isfinite(values).all() for layers in means.values() for values in layers.values()):
        raise UserError(
            f"{name}: its activations are NaN or Inf on {data}; the model is broken, or its dtype too narrow"
        )
    layers = _layers(anatomy, recorder, means)
    own = {b.name: choose(b, recorder.votes[b.name].cpu(), set_size(b, shares[b.kind])) for b in anatomy.blocks}
    others_note = []
    if choices is not None and {n: len(c.order) for n, c in choices.items()} != {
        n: len(c.order) for n, c in own.items()
    }:
        others_note = ["its layers are of other widths than the first model's, so the spaces are of P and N of its own"]
        choices = None
    choices = own if choices is None else choices
    subspaces = read_subspaces(model, anatomy, choices)
    activations = {str(k): v for k, v in means.items()}
    assessed = Assessed(label, seen, tokens, shares, activations, layers, [], choices, subspaces)
    assessed.notes = [*anatomy.notes, *recorder.notes, *others_note]
    assessed.data_notes = list(prepared.statistics.notes)
    if mask is not None:
        assessed.masking = _masking(model, anatomy, recorder, _batches(prepared, others or chosen, model), mask)
        assessed.masking |= {"sequences": len(others or chosen), "same_sequences": not others}
    if prune_sensitivity is not None:
        seen_again, measured = (_batches(prepared, numbers, model) for numbers in (chosen, others or chosen))
        assessed.sensitivity = layer_sensitivity(model, seen_again, measured, prune_sensitivity)
    return assessed


def choose_sequences(there: int, samples: int) -> tuple[list[int], list[int]]:
    """At most `samples` of `there` sequences, spread evenly, and as many others to measure on (perhaps none)."""
    chosen = [i * there // samples for i in range(samples)] if there > samples else list(range(there))
    taken = set(chosen)
    rest = [i for i in range(there) if i not in taken]
    return chosen, [rest[i * len(rest) // samples] for i in range(samples)] if len(rest) > samples else rest


def _batches(prepared: PreparedData, numbers: Sequence[int], model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Sequences of similar length together, so that little is padded."""
    items = sorted((prepared.train[i] for i in numbers), key=lambda item: len(item["input_ids"]))
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    size = max(1, LOGITS_A_PASS // (rows * max((len(item["input_ids"]) for item in items), default=1)))
    return [prepared.collator(items[i : i + size]) for i in range(0, len(items), size)]


def _layers(anatomy: Anatomy, recorder: ActivationRecorder, means: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """By block: scores, the sets of K, and how uneven the block is."""
    told = {}
    for block in anatomy.blocks:
        if block.layer not in means[block.kind]:
            continue
        order = ranking(recorder, block.name)
        count = recorder.votes_per_sample[block.name]
        values = means[block.kind][block.layer]
        told[block.name] = {
            "kind": block.kind,
            "layer": block.layer,
            "rank_score": recorder.votes[block.name].tolist(),
            "average": [float(v) for v in values],
            "top": order[:count].sort().values.tolist(),
            "lowest": order[len(order) - count :].sort().values.tolist(),
            "sigma": sigma(values),
            "sigma_over_mean": relative_sigma(values),
            "strongest_tenth_share": top_share(values),
        }
    return told


def ranking(recorder: ActivationRecorder, block: str) -> Tensor:
    """Units of a block from the highest score to the lowest, ties by index: int64 [ranked]."""
    return recorder.votes[block].cpu().argsort(descending=True, stable=True)


def _masking(
    model: PreTrainedModel,
    anatomy: Anatomy,
    recorder: ActivationRecorder,
    batches: Sequence[Mapping[str, Tensor]],
    share: float,
) -> dict[str, Any]:
    """Loss and perplexity with nothing, the top, the lowest and random units of every block switched off (table 4)."""
    generator = torch.Generator().manual_seed(0)
    sets: dict[str, dict[str, Tensor]] = {"none": {}, "top": {}, "lowest": {}, "random": {}}
    for block in anatomy.blocks:
        order, count = ranking(recorder, block.name), count_of(share, block.ranked)
        sets["top"][block.name] = order[:count]
        sets["lowest"][block.name] = order[len(order) - count :]
        sets["random"][block.name] = torch.randperm(block.ranked, generator=generator)[:count]
    result: dict[str, Any] = {"share": share}
    for name, units in sets.items():
        result[name] = loss_without(model, anatomy, units, batches)
    return result


def _save_activations(path: Path, found: Sequence[Assessed]) -> None:
    tensors = {
        f"{one.label}/{kind}/{layer}": values
        for one in found
        for kind, layers in one.activations.items()
        for layer, values in layers.items()
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"samples": str(found[0].samples)})


def short_names(labels: Sequence[str]) -> list[str]:
    """The last part of each path, and as many parts before it as tell the paths apart (and `model`, as runs name
    theirs, from any other)."""
    parts = [label.strip("/").split("/") for label in labels]
    for count in range(1, max(map(len, parts)) + 1):
        short = ["/".join(one[-count:]) for one in parts]
        if len(set(short)) == len(set(labels)) and (count > 1 or "model" not in short):
            return short
    return list(labels)


def _plot(folder: Path, found: Sequence[Assessed]) -> list[Path]:
    """Pictures name the models as short as can be; where that is not all, a note has the whole paths."""
    names = short_names([one.label for one in found])
    seen = {name: one.activations for name, one in zip(names, found, strict=True)}
    full = [f"{name}: {one.label}" for name, one in zip(names, found, strict=True) if name != one.label]
    note = "; ".join(full)
    made = [plot_activations(seen, kind, folder / f"activations_{kind}.png", note) for kind in ("heads", "channels")]
    for number, (name, one) in enumerate(zip(names, found, strict=True)):
        if one.sensitivity is not None:
            path = folder / f"sensitivity{number or ''}.png"
            made.append(plot_sensitivity(one.sensitivity, path, name, note))
    spaces = plot_spaces(
        dict(zip(names, (one.subspaces for one in found), strict=True)), folder / "subspaces.png", note
    )
    return [path for path in (*made, plot_sigma(seen, folder / "sigma.png", note), spaces) if path is not None]


def _print(found: Sequence[Assessed], written: Sequence[Path]) -> None:
    console = Console()
    tables = wide(console)
    table = Table("model", "", "blocks", "σ/mean", "the strongest hold", header_style="bold")
    for one in found:
        for kind in one.activations:
            blocks = [block for block in one.layers.values() if block["kind"] == kind]
            spread = float(np.mean([block["sigma_over_mean"] for block in blocks]))
            held = float(np.mean([block["strongest_tenth_share"] for block in blocks]))
            said = strongest_of(len(values) for values in one.activations[kind].values())
            table.add_row(Text(one.label), kind, str(len(blocks)), f"{spread:.3f}", f"{held:.1%} ({said})")
    tables.print(table)
    tables.print(_spaces_table(found))
    for one in found:
        console.print(Text(f"{one.label}: {one.samples} samples, {one.tokens:,} tokens; a sample is {SAMPLE}"))
        for note in (*one.notes, *one.data_notes):
            console.print(Text(f"note: {note}"))
        if one.masking is not None:
            tables.print(_masking_table(one))
        if one.sensitivity is not None:
            tables.print(_sensitivity_table(one))
    for path in written:
        console.print(Text(str(path)), soft_wrap=True)


def _spaces_table(found: Sequence[Assessed]) -> Table:
    """Means over layers."""
    of_first = len(found) > 1 and all(one.choices is found[0].choices for one in found)
    title = f"the first model's P and N: spaces (of {found[0].label})" if of_first else "P and N: spaces"
    headers = ("model", "matrix", "effective rank of P", "of N", "of both", "overlap", "by chance")
    table = Table(*headers, title=Text(title), header_style="bold")
    for one in found:
        for role, mean in mean_by_role(one.subspaces).items():
            of = f" of {mean['vectors']:.0f}"
            ranks = (mean[f"effective_rank_{which}"] for which in ("p", "n", "both"))
            p, n, both = (f"{rank:.1f}" for rank in ranks)
            table.add_row(Text(one.label), role, p + of, n + of, both, f"{mean['overlap']:.3f}",
                          f"{mean['overlap_by_chance']:.3f}")  # fmt: skip
    return table


def _masking_table(one: Assessed) -> Table:
    masking = one.masking or {}
    where = "the same sequences" if masking["same_sequences"] else "other sequences of the data"
    title = f"{one.label} without {masking['share']:.0%} of the heads and channels of every layer, on {where}"
    table = Table("masked", "loss", "perplexity", title=Text(title), header_style="bold")
    for name in ("none", "top", "lowest", "random"):
        loss = masking[name]["loss"]
        table.add_row(name, figures.loss(loss), figures.perplexity(loss))
    return table


def _sensitivity_table(one: Assessed) -> Table:
    """The layers that matter most and least."""
    found = one.sensitivity or {}
    ranked = sorted(found["layers"], key=lambda layer: layer["loss"])
    uniform = [(f"{way['share']:.0%} of every layer", way) for way in found["uniform"]]
    shown = [*ranked[-3:][::-1], *ranked[:-3][:1]]
    title = f"{one.label} without {found['share']:.0%} of the key-value groups and channels of one layer"
    if len(shown) < len(ranked):
        title += f", of {len(ranked)} the three missed most and the one missed least"
    table = Table("pruned", "loss", "perplexity", title=Text(title), header_style="bold")
    for name, way in [("nothing", found["none"]), *((f"layer {way['layer']}", way) for way in shown), *uniform]:
        table.add_row(name, figures.loss(way["loss"]), figures.perplexity(way["loss"]))
    return table
