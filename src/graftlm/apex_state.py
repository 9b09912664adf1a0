"""What an Apex needs to go on, as tensors by name: everything but the model's and the optimizer's own state."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftlm.advantage import Choice
from graftlm.panels import local
from graftlm.sharding import is_first, panel_over_shards

if TYPE_CHECKING:
    from graftlm.apex import Apex


def state_of(apex: "Apex") -> dict[str, Tensor]:
    """As Apex.state_dict."""
    state = {f"clock.{k}": torch.tensor(v) for k, v in apex.clock.state().items()}
    state |= {f"container.{k}": v for k, v in apex.container.state_dict().items()}
    # Not computed anew on loading: by then operators and weights have moved.
    state["multipliers"] = torch.tensor(apex.rates.multipliers, dtype=torch.float64)
    state |= {f"recorder.{k}": v for k, v in apex.recorder.summed_state().items()}
    if apex.gradients is not None:
        state |= {f"gradients.{k}": v for k, v in apex.gradients.state().items()}
    if apex.splitter is not None:
        state |= {f"splitter.{k}": v for k, v in apex.splitter.state().items()}
    for name, choice in apex.choices.items():
        state |= {f"choice.{name}.{k}": v for k, v in vars(choice).items()}
    for expansion in apex.expansions:
        for key, panel in expansion.raw.items():
            weight = apex.model.get_parameter(key.partition(":")[0])
            state[f"raw.{key}"] = panel_over_shards(panel, weight)
        for key, rows in expansion.start.items():
            state[f"start.{key}"] = panel_over_shards(rows, apex.model.get_parameter(key.partition(":")[0]))
    return state


def load_state(apex: "Apex", state: Mapping[str, Tensor]) -> None:
    """As Apex.load_state_dict."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    apex.clock.load_state(part("clock."))
    counts = part("recorder.")
    if not is_first():  # they are sums over processes
        counts = {k: v if k.endswith(".fallback") else torch.zeros_like(v) for k, v in counts.items()}
    apex.recorder.load_state_dict(counts)
    if apex.gradients is not None:
        apex.gradients.load_state(part("gradients."))
    if apex.splitter is not None:
        apex.splitter.load_state(part("splitter."))
    apex.rates.multipliers = state["multipliers"].tolist()
    raw, start = part("raw."), part("start.")
    apex.choices = {}
    for expansion in apex.expansions:
        name = expansion.block.name
        apex.choices[name] = expansion.choice = Choice(**part(f"choice.{name}."))
        expansion.raw = {k: local(raw[k]).to(expansion.device) for k in expansion.raw_keys()}
        kept = [mixed.piece.key for mixed in expansion.mixed() if mixed.piece.key in start]  # none in older states
        expansion.start = {k: local(start[k]).to(expansion.device) for k in kept}
    if apex.slices is not None:
        apex.slices.choose(apex.choices, apex.sizes)
    apex.container.load_state_dict(part("container."))
