"""When a stage ends: by optimizer steps, epochs or tokens (section 3.3)."""

from typing import Any

from graftlm.apex_config import ApexConfig
from graftlm.errors import UserError


class StageClock:
    """Counts steps and says when the next stage is due. The last stage lasts until the run ends."""

    def __init__(self, config: ApexConfig, *, total_steps: int | None = None, total_epochs: float | None = None):
        self.config = config
        self.stage = 0
        """Stage now running, from 0."""
        self.step = 0
        """Optimizer steps taken in the run."""
        self.starts = [0]
        """Step at which each stage so far began."""
        self.length = config.stage_length
        if self.length is None and config.stages > 1:
            total = total_steps if config.stage_by == "steps" else total_epochs
            if total is None:
                if config.stage_by == "steps":
                    mend = "give it, or total_steps"
                else:
                    mend = (
                        "give it in epochs, or the run's length in epochs (in a config: num_train_epochs, no max_steps)"
                    )
                raise UserError(f"apex.stage_length: {mend}, so that {config.stages} stages can be laid out")
            self.length = total / config.stages
        self._check(total_steps)

    def begin_at(self, step: int, total_steps: int) -> None:
        """Count from `step` on, which takes no stage yet, and lay out stages by steps over the `total_steps` after
        it: a phase of a longer run."""
        self.step, self.starts = step, [step]
        if self.config.stage_by == "steps" and self.config.stage_length is None and self.config.stages > 1:
            self.length = total_steps / self.config.stages
        self._check(total_steps)

    def _check(self, total_steps: int | None) -> None:
        if self.config.stage_by == "steps" and self.length is not None and self.length < 1:
            raise UserError(
                f"apex.stages: {self.config.stages} stages do not fit in {total_steps} steps; give "
                "more data or epochs, a smaller batch, or fewer apex.stages"
            )

    def due(self, *, epoch: float | None, tokens: int) -> bool:
        """Whether the next stage should begin now, after the step just taken."""
        if self.length is None or self.stage + 1 >= self.config.stages:
            return False
        boundary = (self.stage + 1) * self.length
        if self.config.stage_by == "tokens":
            return tokens >= boundary
        if self.config.stage_by == "epochs":
            if epoch is None:
                raise UserError("apex.stage_by: stages by epochs need advance(epoch=...) with the epochs passed so far")
            return epoch >= boundary - 1e-6  # an epoch's last step may read 0.9999999
        return self.step >= self.starts[0] + round(boundary)

    def next_stage(self) -> None:
        self.stage += 1
        self.starts.append(self.step)

    def state(self) -> dict[str, Any]:
        return {"stage": self.stage, "step": self.step, "starts": self.starts}

    def load_state(self, state: dict[str, Any]) -> None:
        self.stage, self.step = int(state["stage"]), int(state["step"])
        self.starts = [int(start) for start in state["starts"]]
