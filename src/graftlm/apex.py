"""The stage machine: binds a model and an optimizer, for any PyTorch loop (section 3.3, algorithm 1)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.activations import ActivationRecorder
from graftlm.advantage import Choice, choose, set_size
from graftlm.anatomy import Block, read_anatomy
from graftlm.apex_config import ApexConfig
from graftlm.budget import plan_budget
from graftlm.errors import UserError
from graftlm.expansion import Expansion, Tie
from graftlm.sliced_training import SlicedTraining
from graftlm.stages import StageClock

CONTAINER = "apex"
"""Name under which operators and slices live in the model, so that any optimizer and any clipping finds them."""


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
        if hasattr(model, CONTAINER):
            raise UserError("this model already has an Apex; call its finish() before making another")
        self.model = model
        self.config = config = config or ApexConfig()
        self.anatomy = read_anatomy(model)
        self.sizes = {b.name: set_size(b, self._share(b)) for b in self.anatomy.blocks}
        self.clock = StageClock(config, total_steps=total_steps, total_epochs=total_epochs)
        self.expansions = [Expansion(model, block, self._ties(block)) for block in self.anatomy.blocks]
        self.ties = [tie for expansion in self.expansions for tie in expansion.ties]
        self._expansion_of = {tie.name: expansion for expansion in self.expansions for tie in expansion.ties}
        self.operator_parameters = sum(p.numel() for tie in self.ties for p in tie.parameters())
        self.budget = plan_budget(
            model,
            self.anatomy,
            self.sizes,
            self.operator_parameters,
            config.trains,
            config.trainable_budget,
            n_first=config.authors_diagonals,
        )
        self.slices = SlicedTraining(model, self.budget, self.expansions) if self.budget.blocks else None
        self.container = nn.ModuleDict({tie.name: tie for tie in self.ties})
        if self.slices is not None:
            self.container["slices"] = self.slices
        self._join_model()
        self.recorder = ActivationRecorder(
            model, self.anatomy, {"heads": config.k_heads, "channels": config.k_channels}, config.assess_per
        )
        self.recorder.differentiable = config.activation_regularization > 0
        self.choices: dict[str, Choice] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self._pulled_at = -1  # tokens of training passes when gradients were last pulled back
        self._handles: list[Any] = []
        self._groups: list[tuple[int, int]] = []
        """Parameter group of each operator (of all, where they share a rate), with the place of its tie."""
        self._multipliers: list[float] = []
        """Operator learning rate over the learning rate, by tie; set when a stage begins."""
        self._rates: dict[int, Any] = {}
        """During a step: the learning rates that its groups had before."""

    # -- construction ---------------------------------------------------------------------------------------------

    def _share(self, block: Block) -> float:
        return self.config.k_heads if block.kind == "heads" else self.config.k_channels

    def _ties(self, block: Block) -> list[Tie]:
        config = self.config
        if not config.expand:
            return []
        groups = [block.mixed] if config.share_operators else [(matrix,) for matrix in block.mixed]
        size = self.sizes[block.name]
        return [Tie(self.model, block, group, size, config.operator, config.authors_diagonals) for group in groups]

    def _join_model(self) -> None:
        self.model.add_module(CONTAINER, self.container)

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
        """Share of components in P (and in N) after rounding, by kind."""
        return {b.kind: self.sizes[b.name] / b.components for b in self.anatomy.blocks}

    @property
    def notes(self) -> list[str]:
        """What a user should know about this model and these settings."""
        notes = [*self.anatomy.notes, *self.recorder.notes]
        for kind, share in self.effective_k.items():
            asked = self.config.k_heads if kind == "heads" else self.config.k_channels
            if abs(share - asked) > 0.005:
                unit = "key-value groups" if kind == "heads" else "channels"
                notes.append(f"{kind}: K = {asked:.2%} becomes {share:.2%} when rounded on {unit}")
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
        return self.recorder.run(batches)

    def scores(self) -> dict[str, Tensor]:
        """Score of every head or channel by block: [ranked] (eq. 3, 5; the variants of table 6)."""
        self.recorder.reduce()
        scores: dict[str, Tensor] = {}
        for i, block in enumerate(self.anatomy.blocks):
            if self.config.assessment == "random":
                generator = self._generator(i)
                scores[block.name] = torch.rand(block.ranked, generator=generator)
            elif not self.recorder.samples[block.name]:
                raise UserError(
                    "apex: nothing was assessed before this stage; pass assess_on=batches to start(), or use "
                    "assessment: random"
                )
            else:
                table = self.recorder.votes if self.config.assessment == "rank" else self.recorder.sums
                scores[block.name] = table[block.name].cpu()
        return scores

    def _generator(self, block: int) -> torch.Generator:
        """One stream of random numbers per seed, stage and block: what a run draws does not depend on its history."""
        seed = ((self.config.seed or 0) * 1_000_003 + self.clock.stage) * 1_000_003 + block
        return torch.Generator().manual_seed(seed)

    # -- stages ---------------------------------------------------------------------------------------------------

    def start(self, optimizer: torch.optim.Optimizer, assess_on: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Bind the optimizer (made over model.parameters()) and begin the first stage, or go on with a loaded one.

        Operators move to parameter groups of their own: no weight decay, learning rate times operator_learning_rate.
        """
        if assess_on is not None:
            self.assess(assess_on)
        self.optimizer = optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self._regroup(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if not self.choices:
            self.begin_stage()

    def _regroup(self, optimizer: torch.optim.Optimizer) -> None:
        has = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) not in has for p in self.container.parameters()):
            raise UserError(
                "apex: the optimizer lacks the operators or slices; make it over model.parameters() after Apex(model)"
            )
        ours = {id(p) for tie in self.ties for p in tie.parameters()}
        template: dict[str, Any] = {}
        for group in optimizer.param_groups:
            kept = [p for p in group["params"] if id(p) not in ours]
            if len(kept) < len(group["params"]):
                template = {k: v for k, v in group.items() if k != "params"}
                group["params"] = kept
        places = range(len(self.ties))
        sets = [[i] for i in places] if self.config.operator_learning_rate == "auto" else [list(places)]
        self._groups = []
        for ties in sets:
            parameters = [p for i in ties for p in self.ties[i].parameters()]
            if parameters:
                optimizer.add_param_group({**template, "params": parameters, "weight_decay": 0.0})
                self._groups.append((len(optimizer.param_groups) - 1, ties[0]))

    def _multiplier(self, tie: Tie) -> float:
        """Operator learning rate over the learning rate: as set, or the m at which M W[P] moves a row as far as Adam
        moves it directly, 1 / (spread(M) * rms(W[P]))."""
        rate = self.config.operator_learning_rate
        if rate != "auto":
            return float(rate)
        panels = self._expansion_of[tie.name].advantageous_panels(tie)
        rms = float(torch.cat([p.flatten() for p in panels]).double().square().mean().sqrt())
        return 1.0 / (tie.operator.spread() * rms) if rms > 0 else 1.0

    def begin_stage(self) -> None:
        """Choose P and N from what was assessed, zero the operators, forget their optimizer state and the counts."""
        scores = self.scores()
        self.choices = {b.name: choose(b, scores[b.name], self.sizes[b.name]) for b in self.anatomy.blocks}
        if self.slices is not None:
            self.slices.choose(self.choices, self.sizes)
        for i, expansion in enumerate(self.expansions):
            expansion.begin(self.choices[expansion.block.name], self._generator(i))
        self._multipliers = [self._multiplier(tie) for tie in self.ties]
        if self.optimizer is not None:
            for parameter in self.container.parameters():
                self.optimizer.state.pop(parameter, None)
        self.recorder.reset()

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
        find = self.slices.gradient if self.slices is not None else self._gradient
        for expansion in self.expansions:
            expansion.pull_back(find)
        self._pulled_at = self.recorder.tokens

    def _gradient(self, name: str) -> tuple[Tensor, Tensor | None] | None:
        grad = self.model.get_parameter(name).grad
        return None if grad is None else (grad, None)

    def _before_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if self._pulled_at != self.recorder.tokens:
            raise UserError("apex: call pull_back() after backward() and before clipping and optimizer.step()")
        self._rates = {group: optimizer.param_groups[group]["lr"] for group, _ in self._groups}
        for group, tie in self._groups:
            optimizer.param_groups[group]["lr"] = self._rates[group] * self._multipliers[tie]
        if self.slices is None:
            for expansion in self.expansions:
                expansion.restore()

    def _after_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        for group, rate in self._rates.items():
            optimizer.param_groups[group]["lr"] = rate  # as it was: multiplying back would round
        if self.slices is not None:
            for expansion in self.expansions:
                expansion.restore()
            self.slices.write()
        for expansion in self.expansions:
            expansion.apply()
        self._pulled_at = -1

    def due(self, epoch: float | None = None) -> bool:
        """Whether the next stage is due."""
        return self.clock.due(epoch=epoch, tokens=self.recorder.tokens)

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
        state = {f"clock.{k}": torch.tensor(v) for k, v in self.clock.state().items()}
        state |= {f"container.{k}": v for k, v in self.container.state_dict().items()}
        # Not computed anew on loading: by then operators and weights have moved.
        state["multipliers"] = torch.tensor(self._multipliers, dtype=torch.float64)
        state |= {f"recorder.{k}": v for k, v in self.recorder.state_dict().items()}
        for name, choice in self.choices.items():
            state |= {f"choice.{name}.{k}": v for k, v in vars(choice).items()}
        for expansion in self.expansions:
            state |= {f"raw.{k}": v for k, v in expansion.raw.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`; the model's weights (the effective ones) must have been loaded before, and `start`
        comes after."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self.clock.load_state(part("clock."))
        self.recorder.load_state_dict(part("recorder."))
        self._multipliers = state["multipliers"].tolist()
        raw = part("raw.")
        self.choices = {}
        for expansion in self.expansions:
            name = expansion.block.name
            self.choices[name] = expansion.choice = Choice(**part(f"choice.{name}."))
            expansion.raw = {k: raw[k].to(expansion.device) for k in expansion.raw_keys()}
        if self.slices is not None:
            self.slices.choose(self.choices, self.sizes)
        self.container.load_state_dict(part("container."))
