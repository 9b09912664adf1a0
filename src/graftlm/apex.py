"""The stage machine: binds a model and an optimizer, for any PyTorch loop (section 3.3, algorithm 1)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from graftlm.activations import ActivationRecorder
from graftlm.advantage import Choice, choose, set_size
from graftlm.anatomy import Block, read_anatomy
from graftlm.apex_config import ApexConfig
from graftlm.apex_state import load_state, state_of
from graftlm.budget import plan_budget
from graftlm.errors import UserError
from graftlm.expansion import Expansion, Mixed, apply, groups_of, pull_back, restore
from graftlm.importance import GradientScores, weight_scores
from graftlm.operator_rates import OperatorRates
from graftlm.sharding import is_sharded, reshard, root_mean_square, sum_gradients, whole_parameters
from graftlm.sliced_training import SlicedTraining
from graftlm.splitting import Splitter
from graftlm.stages import StageClock
from graftlm.ties import Tie

CONTAINER = "apex"
"""Name under which operators and slices live in the model, so that any optimizer and any clipping finds them."""
BATCH_BYTES = 1 << 28
"""Panels of N that a GPU takes at once. A batch needs about eight times as much for a moment."""


class Apex:
    """APEX for one model.

        apex = Apex(model, ApexConfig(stages=3), total_steps=1000)    # before the optimizer is made
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
        apex.start(optimizer, assess_on=batches)
        for batch in loader:
            model(**batch).loss.backward()
            apex.pull_back()                                          # after the last backward pass, before clipping
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            apex.advance()                                            # fuses and starts the next stage when due
        apex.finish()

    The model holds effective weights all the time (its output is always the expanded model's); operators are among its
    parameters but not in its state_dict.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ApexConfig | None = None,
        *,
        total_steps: int | None = None,
        total_epochs: float | None = None,
    ):
        """Args:
            model: a causal language model of a known family (anatomy.py); its parameters may be float32 or bfloat16.
            config: settings; None takes the defaults.
            total_steps: optimizer steps of the run (stages by steps without stage_length).
            total_epochs: epochs of the run (stages by epochs without stage_length).

        Raises UserError if the model cannot be expanded, K is too large for disjoint sets, or the budget too small.
        """
        if is_sharded(model) and config is not None and config.start == "split":
            raise UserError("apex.start: split cannot be sharded (distributed.strategy: fsdp2); use ddp, or zero")
        if hasattr(model, CONTAINER):
            raise UserError("this model already has an Apex; call its finish() before making another")
        reshard(model)  # what is gathered are not the parameters that are asked for below
        self.model = model
        self.config = config = config or ApexConfig()
        self.anatomy = read_anatomy(model)
        self.sizes = {b.name: set_size(b, self._share(b)) for b in self.anatomy.blocks}
        self.clock = StageClock(config, total_steps=total_steps, total_epochs=total_epochs)
        self.expansions = [Expansion(model, block, self._ties(block)) for block in self.anatomy.blocks]
        self.ties = [tie for expansion in self.expansions for tie in expansion.ties]
        self._expansion_of = {tie.name: expansion for expansion in self.expansions for tie in expansion.ties}
        on_p = sum(tie.scale_p is not None for tie in self.ties)
        self.budget = plan_budget(
            model,
            self.anatomy,
            self.sizes,
            sum(p.numel() for tie in self.ties for p in tie.parameters()),
            config.trains,
            config.trainable_budget,
            n_first=config.authors_diagonals,
        )
        self.slices = SlicedTraining(model, self.budget, self.expansions) if self.budget.blocks else None
        self._without_p = on_p - sum(tie.scale_p is not None for tie in self.ties)
        """Operators without the authors' diagonal on P."""
        self.operator_parameters = sum(p.numel() for tie in self.ties for p in tie.parameters())
        self.container = nn.ModuleDict({tie.name: tie for tie in self.ties})
        if self.slices is not None:
            self.container["slices"] = self.slices
        self._join_model()
        self.recorder = ActivationRecorder(
            model,
            self.anatomy,
            {"heads": config.k_heads, "channels": config.k_channels},
            config.assess_per,
            fused_gate=config.fused_gate,
        )
        # By steps since the stage began, so that a resumed run looks at the same passes and every stage sees some.
        self.recorder.due = lambda: (self.clock.step - self.clock.starts[-1]) % config.assess_interval == 0
        self.recorder.differentiable = config.activation_regularization > 0
        by_gradient = config.assessment == "gradient"
        self.gradients = GradientScores(model, self.anatomy.blocks) if by_gradient else None
        self.choices: dict[str, Choice] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self._pulled_at = -1  # training passes so far when gradients were last pulled back
        self._handles: list[Any] = []
        self.rates = OperatorRates(self.ties, apart=config.operator_learning_rate == "auto")
        self.before_split: Callable[[], None] = lambda: None
        """Called before a stage's split, if any, changes the model."""
        self.splitter = Splitter(model, self.anatomy, config.split_tolerance) if config.start == "split" else None
        self._batches: list[list[Mixed]] = []
        """Matrices of one shape, whose products are done at once."""

    # -- construction ---------------------------------------------------------------------------------------------

    def _share(self, block: Block) -> float:
        return self.config.k_heads if block.kind == "heads" else self.config.k_channels

    def _ties(self, block: Block) -> list[Tie]:
        config = self.config
        if not config.expand:
            return []
        mixed = tuple(matrix for matrix in block.mixed if matrix.role in config.modules)
        groups = [(matrix,) for matrix in mixed] if not config.share_operators else [mixed] if mixed else []
        size = self.sizes[block.name]
        return [Tie(self.model, block, group, size, config.operator, config.authors_diagonals) for group in groups]

    def _join_model(self) -> None:
        self.model.add_module(CONTAINER, self.container)
        # DDP would wait for gradients that come after the backward pass, computed alike on every rank.
        ours = [f"{CONTAINER}.{tie.name}.{name}" for tie in self.ties if not tie.by_tokens
                for name, _ in tie.named_parameters()]  # fmt: skip
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, ours)

        def drop(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
            for key in [k for k in state if k.startswith(f"{prefix}{CONTAINER}.")]:
                del state[key]

        def excuse(_module: nn.Module, incompatible: Any) -> None:
            missing = [k for k in incompatible.missing_keys if not k.startswith(f"{CONTAINER}.")]
            incompatible.missing_keys[:] = missing

        self._model_handles = [
            self.model.register_state_dict_post_hook(drop),
            self.model.register_load_state_dict_post_hook(excuse),
        ]

    @property
    def effective_k(self) -> dict[str, float]:
        """Share of components in P (and in N) after rounding, by kind, over all layers."""
        found: dict[str, float] = {}
        for kind in self.anatomy.kinds:
            blocks = list(self.anatomy.of_kind(kind))
            found[kind] = sum(self.sizes[b.name] for b in blocks) / sum(b.components for b in blocks)
        return found

    @property
    def notes(self) -> list[str]:
        """What a user should know about this model and these settings."""
        notes = [*self.anatomy.notes, *self.recorder.notes, *(self.splitter.notes if self.splitter else [])]
        for kind in self.anatomy.kinds:
            blocks = list(self.anatomy.of_kind(kind))
            asked, shares = self._share(blocks[0]), [self.sizes[b.name] / b.components for b in blocks]
            if max(abs(share - asked) for share in shares) > 0.005:
                unit = "key-value groups" if kind == "heads" else "channels"
                low, high = f"{min(shares):.2%}", f"{max(shares):.2%}"
                became = low if low == high else f"{low} to {high} (by layer)"
                notes.append(f"{kind}: K = {asked:.2%} becomes {became} when rounded on {unit}")
        if self._without_p:
            notes.append(
                f"authors_diagonals: P does not train whole at {self._without_p} of {len(self.ties)} operators, which "
                "have the diagonal on N alone"
            )
        if self.slices is not None:
            aim = self.config.trainable_budget
            notes.append(f"trainable: {self.budget.fraction:.3%} of all parameters (budget {aim:.3%})")
        return notes

    # -- assessment -----------------------------------------------------------------------------------------------

    def assess(self, batches: Iterable[Mapping[str, Tensor]]) -> int:
        """Score components on forward passes before training (footnote 3); returns the sequences seen.

        Args:
            batches: what the model takes: input_ids [B, S] and perhaps attention_mask, position_ids, on any device.
        """
        if self.gradients is not None:
            return self.gradients.run(batches)
        if self.config.assessment == "magnitude":
            return 0
        return self.recorder.run(batches if self.splitter is None else self.splitter.watching(batches))

    def scores(self) -> dict[str, Tensor]:
        """Score of every head or channel by block: [ranked] (eq. 3, 5; the variants of table 6; importance.py)."""
        if self.config.assessment == "magnitude":
            return weight_scores(self.model, self.anatomy.blocks)
        if self.gradients is not None and self.gradients.count:
            return self.gradients.scores()
        counted = self.recorder.summed_state() if self.config.assessment != "random" else {}
        scores: dict[str, Tensor] = {}
        what = "votes" if self.config.assessment == "rank" else "sums"
        for i, block in enumerate(self.anatomy.blocks):
            if self.config.assessment == "random":
                generator = self._generator(i)
                scores[block.name] = torch.rand(block.ranked, generator=generator)
            elif not counted[f"{block.name}.samples"]:
                raise UserError(
                    "apex: nothing was assessed before this stage; pass assess_on=batches to start(), or use "
                    "assessment: random"
                )
            else:
                scores[block.name] = counted[f"{block.name}.{what}"].cpu()
        return scores

    def _generator(self, block: int) -> torch.Generator:
        """One stream of random numbers per seed, stage and block: what a run draws does not depend on its history."""
        seed = ((self.config.seed or 0) * 1_000_003 + self.clock.stage) * 1_000_003 + block
        return torch.Generator().manual_seed(seed % (1 << 63))

    # -- stages ---------------------------------------------------------------------------------------------------

    def start(self, optimizer: torch.optim.Optimizer, assess_on: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Bind the optimizer (made over model.parameters()) and begin the first stage, or go on with a loaded one.

        Operators move to parameter groups of their own: no weight decay, learning rate times operator_learning_rate;
        so a learning-rate schedule is made after this.
        """
        if assess_on is not None:
            self.assess(assess_on)
        self.optimizer = optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self.rates.join(optimizer, list(self.container.parameters()))
        # A CPU is faster on one matrix at a time, which stays in its cache; a GPU on as many as its memory bears.
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        self._batches = groups_of(self.expansions, 0 if on_cpu else BATCH_BYTES)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if not self.choices:
            self.begin_stage()

    def _multiplier(self, tie: Tie) -> float:
        """Operator learning rate over the learning rate: as set, or the m at which M W[P] moves a row as far as Adam
        moves it directly, 1 / (spread(M) * rms(W[P]))."""
        rate = self.config.operator_learning_rate
        if rate != "auto":
            return float(rate)
        panels = self._expansion_of[tie.name].advantageous_panels(tie)
        over_shards = [isinstance(self.model.get_parameter(piece.name), DTensor) for piece in tie.pieces]
        rms = root_mean_square(panels, over_shards)
        return 1.0 / (tie.operator.spread() * rms) if rms > 0 else 1.0

    def begin_stage(self) -> None:
        """Choose P and N from what was assessed, zero the operators, forget their optimizer state and the counts."""
        scores = self.scores()
        self.choices = {b.name: choose(b, scores[b.name], self.sizes[b.name]) for b in self.anatomy.blocks}
        if self.slices is not None:
            self.slices.choose(self.choices, self.sizes)
        generators = {b.name: self._generator(i) for i, b in enumerate(self.anatomy.blocks)}
        if self.splitter is not None:
            self.before_split()
            activations = self.recorder.mean_activations()
            self.splitter.split(self.choices, activations, generators, self.optimizer, self.clock.stage)
        for expansion in self.expansions:
            name = expansion.block.name
            expansion.begin(self.choices[name], generators[name], self.config.operator_scale)
        self.rates.multipliers = [self._multiplier(tie) for tie in self.ties]
        if self.optimizer is not None:
            kept = (
                {id(p) for tie in self.ties for p in tie.parameters()} if self.config.keep_operator_moments else set()
            )
            for parameter in self.container.parameters():
                if id(parameter) not in kept:
                    self.optimizer.state.pop(parameter, None)
        self.recorder.reset()
        if self.gradients is not None:
            self.gradients.reset()

    def fuse(self) -> None:
        """End of a stage (eq. 14). The model holds W~ already, so this changes none of its bits."""
        for expansion in self.expansions:
            expansion.end()
        self.choices = {}

    # -- one step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pull_back(self) -> None:
        """Turn the gradients of the model, by effective weights, into those of raw weights and operators.

        Call it once per optimizer step: after the last backward pass of an accumulation, before clipping.
        """
        if self.gradients is not None and self.recorder.due():
            self.gradients.add()
        find = self.slices.gradient if self.slices is not None else self._gradient
        if not is_sharded(self.model):
            for batch in self._batches:
                pull_back(batch, find)
        else:
            if self.slices is not None:
                self.slices.finish_gradients()
            # What FSDP leaves alone: biases of mixed rows, and operators whose gradient came token by token.
            sum_gradients(whole_parameters(self.model), mean=True)
            for batch in self._batches:
                if self._over_shards(batch):
                    pull_back(batch, find)
            # Each rank had the part of its shards.
            sum_gradients(p for tie in self.ties if not tie.by_tokens for p in tie.parameters())
            for batch in self._batches:  # biases, which give every rank the same part
                if not self._over_shards(batch):
                    pull_back(batch, find)
        self._pulled_at = self.recorder.passes

    def _over_shards(self, batch: list[Mixed]) -> bool:
        return isinstance(self.model.get_parameter(batch[0].piece.name), DTensor)

    def _gradient(self, name: str) -> tuple[Tensor, Tensor | None] | None:
        grad = self.model.get_parameter(name).grad
        return None if grad is None else (grad, None)

    def _before_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if self._pulled_at != self.recorder.passes:
            raise UserError("apex: call pull_back() after backward() and before clipping and optimizer.step()")
        self.rates.begin_step(optimizer)
        if self.slices is None:
            for batch in self._batches:
                restore(batch)

    def _after_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self.rates.end_step(optimizer)
        if self.slices is not None:
            self.slices.write()
        for batch in self._batches:
            apply(batch)
        self._pulled_at = -1

    def due(self, epoch: float | None = None) -> bool:
        """Whether the next stage is due."""
        by_tokens = self.config.stage_by == "tokens"  # else not asked: the device may still be counting
        tokens = self.recorder.summed_tokens() if by_tokens else 0
        return self.clock.due(epoch=epoch, tokens=tokens)

    def advance(self, epoch: float | None = None) -> bool:
        """After an optimizer step: fuse and begin the next stage when it is due. Returns whether it did.

        Args:
            epoch: epochs passed so far, where stages are counted in epochs.
        """
        self.clock.step += 1
        if not self.due(epoch):
            return False
        self.next_stage()
        return True

    def next_stage(self) -> None:
        """Fuse now and begin the next stage."""
        self.fuse()
        self.clock.next_stage()
        self.begin_stage()

    def penalty(self) -> Tensor | None:
        """Activation regularisation of the last forward pass (table 7), to be added to the loss; None when off."""
        if self.recorder.penalty is None:
            return None
        return self.config.activation_regularization * self.recorder.penalty

    def finish(self) -> None:
        """Fuse and leave the model as it was found: an ordinary one, with better weights."""
        self.fuse()
        for handle in [*self._handles, *self._model_handles]:
            handle.remove()
        self.recorder.close()
        if self.slices is not None:
            self.slices.close()
        delattr(self.model, CONTAINER)

    # -- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything but the model's and the optimizer's own state, as tensors by name."""
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`; the model's weights (the effective ones) must have been loaded before, and `start`
        comes after."""
        load_state(self, state)
