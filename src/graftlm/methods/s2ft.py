"""S2FT: some whole heads and channels train, as dense slices of the matrices that they are part of.

Source: Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", NeurIPS 2024,
arXiv 2412.06289. Heads and channels are chosen once, at random by default as there; by weight, activation or gradient
on request (its S2FT-W, -A and -G). What trains by default are the columns of output and down projections, as in the
authors' runs; with `trains: coupled` the rows of value, up and gate projections that belong to them too, in whole
key-value groups. Departs from their code in how a budget is divided: here every layer trains the same number of heads
and of channels, and the same share of both; there they are drawn over all layers together, and LLaMA2-7B trains 5.2% of
its heads and 2% of its channels (as many parameters in both), Llama3-8B 3% of its channels and no head (`s2ft.heads`
and `s2ft.channels` set such numbers). The paper permutes what it chose to one end of each matrix, to train
dense parts of it; slices.py picks it where it lies, so that nothing is permuted, with the same result: gradients exist
only for what trains, and only what they need is saved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftlm.activations import ActivationRecorder
from graftlm.advantage import Choice
from graftlm.anatomy import Block, read_anatomy
from graftlm.budget import Budget, Counts, component_size
from graftlm.errors import UserError
from graftlm.expansion import Expansion
from graftlm.importance import GradientScores, weight_scores
from graftlm.methods.base import Batches, Method
from graftlm.methods.sparse_settings import S2ftSettings
from graftlm.parts import count_parameters
from graftlm.sliced_training import SlicedTraining
from graftlm.splitting import most
from graftlm.training.config import RunConfig

CONTAINER = "s2ft"
"""Name under which slices live in the model."""


def trained_blocks(blocks: Sequence[Block], trains: str) -> list[Block]:
    """`blocks`, with what trains of them as all that they have; its units are heads where the output projection trains
    alone, and key-value groups elsewhere."""
    if trains == "coupled":
        return [replace(block, followers=()) for block in blocks]
    found = []
    for block in blocks:
        alone = replace(block.output, slots=1)  # a component's slots lie side by side, so each can be one
        found.append(replace(block, components=block.ranked, mixed=(alone,), followers=()))
    return found


def plan_counts(model: PreTrainedModel, blocks: Sequence[Block], settings: S2ftSettings) -> dict[str, int]:
    """How many heads, and how many channels, train in every layer.

    Where the settings give no number: the budget's share of both, heads rounded (at least one), and channels for what
    is left, rounded down. One of them: its cost is taken off the budget, and of the other as many train as the rest
    holds, or all. Both: these, and the budget is not looked at.
    """
    total = count_parameters(model)
    costs = {block.name: component_size(model, block, False) for block in blocks}
    of_kind = {kind: [block for block in blocks if block.kind == kind] for kind in ("heads", "channels")}
    there = {kind: max((block.components for block in some), default=0) for kind, some in of_kind.items()}
    groups = "key-value groups" if settings.trains == "coupled" else "heads"
    given = {kind: n for kind in of_kind if (n := getattr(settings, kind)) is not None}

    def size(kind: str, count: int) -> int:
        """Parameters of `count` in each layer, or of all where it has fewer."""
        return sum(min(count, block.components) * costs[block.name] for block in of_kind[kind])

    def within(kind: str, limit: float) -> int:
        """The most of each layer whose parameters are at most `limit`."""
        return most(there[kind], lambda count: size(kind, count) <= limit)

    for kind, asked in given.items():
        if asked and not there[kind]:
            raise UserError(f"s2ft.{kind}: this model has no {kind} that are known; leave it out")
        if asked > there[kind]:
            unit = groups if kind == "heads" else kind
            raise UserError(f"s2ft.{kind}: {asked} is more than the {there[kind]} {unit} of a layer; lower it")
    if len(given) == 2:
        return given
    everything = sum(size(kind, there[kind]) for kind in of_kind)
    limit = settings.budget * total
    if limit > everything:
        mend = "lower it, or choose s2ft.trains: coupled" if settings.trains == "output" else "lower it"
        raise UserError(
            f"s2ft.budget: {settings.budget:.4g} is more than everything that can train ({everything / total:.4g} of "
            f"all parameters): {mend}"
        )
    for kind, asked in given.items():
        if size(kind, asked) > limit:
            other = "channels" if kind == "heads" else "heads"
            raise UserError(
                f"s2ft.budget: {settings.budget:.4g} of all parameters is less than s2ft.{kind}: {asked} takes "
                f"({size(kind, asked) / total:.4g}); raise it, lower s2ft.{kind}, or give s2ft.{other} too"
            )
    counts = dict(given)
    if not given:
        counts["heads"] = min(max(1, round(limit / everything * there["heads"])), within("heads", limit))
    for kind in of_kind.keys() - counts.keys():
        counts[kind] = within(kind, limit - sum(size(known, count) for known, count in counts.items()))
    if not any(counts.values()):
        free = [kind for kind in of_kind if kind not in given and there[kind]]
        if not free:
            raise UserError(f"s2ft.{next(iter(given))}: 0 leaves nothing of this model to train; leave it out")
        least = min(size(kind, 1) for kind in free)
        raise UserError(
            f"s2ft.budget: {settings.budget:.4g} of all parameters is too little for one channel or head a layer; that "
            f"is {least:,} parameters: raise it"
        )
    return counts


class S2ft(Method):
    def __init__(self, model: PreTrainedModel, config: RunConfig):
        super().__init__(model, config)
        self.settings: S2ftSettings = config.s2ft
        self.anatomy = read_anatomy(model, smallest=1)  # nothing is chosen against anything
        self.blocks = trained_blocks(self.anatomy.blocks, self.settings.trains)
        self.counts = plan_counts(model, self.blocks, self.settings)
        self.total = count_parameters(model)
        self.choices: dict[str, Choice] = {}
        self.slices: SlicedTraining | None = None

    # -- the contract -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        counts = {b.name: Counts(n=min(self.counts[b.kind], b.components)) for b in self.blocks}
        budget = Budget(self.total, 0, self.trainable, blocks=counts)
        self.slices = SlicedTraining(self.model, budget, [Expansion(self.model, block, []) for block in self.blocks])
        self.model.add_module(CONTAINER, self.slices)
        scores = {}
        for i, block in enumerate(self.blocks):
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + i)
            scores[block.name] = torch.rand(block.components, generator=generator)
        if not next(self.model.parameters()).is_meta:  # there are no values to take out, nor needed to count
            self._choose(scores)

    def look(self, batches: Batches) -> None:
        settings = self.settings
        if settings.choose_by == "random":
            return
        if settings.choose_by == "weight":
            found = weight_scores(self.model, self.blocks)
        elif settings.choose_by == "activation":
            shares = dict.fromkeys(self.anatomy.kinds, 0.1)  # for votes, which are not used
            recorder = ActivationRecorder(self.model, self.anatomy, shares)
            with self.mixed():
                recorder.run(batches(settings.samples))
            means = recorder.mean_activations()
            found = {block.name: means[block.kind][block.layer] for block in self.anatomy.blocks}
            recorder.close()
        else:
            found = self._gradient_scores(batches)
        # By component: those of a group's heads together.
        self._choose({b.name: found[b.name].view(b.components, -1).sum(1) for b in self.blocks})

    def _gradient_scores(self, batches: Batches) -> dict[str, Tensor]:
        """With whole gradients of the matrices, for which slices are taken off for a while."""
        assert self.slices is not None
        self.slices.close()
        matrices = {f"{matrix.module}.weight" for block in self.blocks for matrix in block.mixed}
        own = {name: p for name, p in self.model.named_parameters() if not name.startswith(f"{CONTAINER}.")}
        for name, parameter in own.items():
            parameter.requires_grad_(name in matrices)
        measured = GradientScores(self.model, self.blocks)
        with self.mixed():
            measured.run(batches(self.settings.samples))
        for parameter in own.values():
            parameter.requires_grad_(False)
        return measured.scores()

    def _choose(self, scores: Mapping[str, Tensor]) -> None:
        """Train the highest of `scores` (components of each block by name)."""
        self._train({name: s.argsort(stable=True, descending=not self.settings.highest) for name, s in scores.items()})

    def _train(self, orders: Mapping[str, Tensor]) -> None:
        """Train the last of each order."""
        assert self.slices is not None
        nothing = torch.empty(0, dtype=torch.int64)
        self.choices = {name: Choice(nothing, nothing, order) for name, order in orders.items()}
        self.slices.choose(self.choices, dict.fromkeys(orders, 0))

    def state_dict(self) -> dict[str, Tensor]:
        return {f"order.{name}": choice.order for name, choice in self.choices.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._train({key.removeprefix("order."): order for key, order in state.items()})

    def after_step(self, step: int) -> None:
        assert self.slices is not None
        self.slices.write()

    def finish(self) -> None:
        assert self.slices is not None
        self.slices.close()
        delattr(self.model, CONTAINER)
        self.slices = None

    def looks(self) -> tuple[int, bool]:
        by = self.settings.choose_by
        return self.settings.samples if by in ("activation", "gradient") else 0, by == "gradient"

    def resolved(self) -> RunConfig:
        return replace(
            self.config, s2ft=replace(self.settings, heads=self.counts["heads"], channels=self.counts["channels"])
        )

    def gradients(self) -> dict[str, int]:
        assert self.slices is not None
        found = {m.module: self.slices.slice_of(m.module) for block in self.blocks for m in block.mixed}
        return {name: piece.weight.numel() for name, piece in found.items() if piece is not None}

    @property
    def trainable(self) -> int:
        return sum(min(self.counts[b.kind], b.components) * component_size(self.model, b, False) for b in self.blocks)

    @property
    def notes(self) -> list[str]:
        found = [f"trainable: {self.trainable / self.total:.3%} of all parameters"]
        for kind in self.anatomy.kinds:
            unit = "key-value groups" if kind == "heads" and self.settings.trains == "coupled" else kind
            found.append(f"{unit} that train: {self.counts[kind]} in each layer")
        return [*self.anatomy.notes, *found]
