"""All plots of a run folder, and the ones that other verbs draw on their own."""

from pathlib import Path

from graftlm.reporting import figures
from graftlm.reporting.choices import plot_stages
from graftlm.reporting.curves import plot_learning_rate, plot_loss
from graftlm.reporting.distributions import plot_activations, plot_sigma
from graftlm.reporting.rundata import Activations, RunData, read_run

__all__ = ["make_plots", "plot_activations", "plot_learning_rate", "plot_loss", "plot_sigma", "plot_stages"]


def make_plots(run: Path) -> list[Path]:
    """Draw RUN/plots/*.png from what the run folder holds so far; the files written, in reading order.

    Raises UserError for a folder that is missing or broken.
    """
    return draw(read_run(run))


def draw(data: RunData) -> list[Path]:
    """`make_plots` for a run already read."""
    folder = data.folder / "plots"
    seen = distributions_of(data)
    made = (
        plot_loss(data, "tokens", folder / "loss_tokens.png"),
        plot_loss(data, "seconds", folder / "loss_seconds.png"),
        plot_learning_rate(data, folder / "learning_rate.png"),
        plot_activations(seen, "heads", folder / "activations_heads.png"),
        plot_activations(seen, "channels", folder / "activations_channels.png"),
        plot_sigma(seen, folder / "sigma.png"),
        plot_stages(data.stages, folder / "stages.png"),
    )
    return [path for path in made if path is not None]


def distributions_of(data: RunData) -> Activations:
    """A run's activations under the names that plots show: before, after APEX, after control."""
    names = {"after": f"after {figures.method_name(data.method)}"}
    seen = {names.get(when, when): kinds for when, kinds in sorted(data.activations.items(), key=_by_time)}
    if data.control is not None and "after" in data.control.activations:
        seen["after control"] = data.control.activations["after"]
    return seen


def _by_time(item: tuple[str, object]) -> tuple[int, str]:
    """before, then after, then whatever else."""
    return ({"before": 0, "after": 1}.get(item[0], 2), item[0])
