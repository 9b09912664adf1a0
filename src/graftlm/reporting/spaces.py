"""Effective rank of P and N and the overlap of their spaces, layer by layer (section 3.4)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftlm.reporting.style import BEFORE, colours, figure, legend, lines, save, style, whole_numbers

Spaces = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""{block: {role: Subspaces as a dict}}."""


def mean_by_role(spaces: Spaces) -> dict[str, dict[str, float]]:
    """Means over layers of every number, by the matrix's role."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for roles in spaces.values():
        for role, found in roles.items():
            rows.setdefault(role, []).append(found)
    return {role: {k: sum(r[k] for r in found) / len(found) for k in found[0]} for role, found in rows.items()}


def plot_spaces(models: Mapping[str, Spaces], path: Path, note: str = "") -> Path | None:
    """A column for each mixed matrix: effective rank of N over that of P, and the overlap beside what chance gives;
    `note` says more of the models."""
    roles = list(mean_by_role(next(iter(models.values()))))
    if not roles:
        return None
    said = [
        f"{role} "
        + ", ".join(f"{mean_by_role(s)[role]['overlap'] / max(1e-12, mean_by_role(s)[role]['overlap_by_chance']):.2f}"
                    for s in models.values())
        for role in roles
    ]  # fmt: skip
    made = figure(
        "Overlap of the spaces of P and N, times what chance gives: " + "; ".join(said),
        width=2.6 * len(roles) + 1,
        height=5.4,
        note="Above: effective rank of N / of P. Below: mean squared cosine of principal angles; dotted: by chance. "
        + note,
    )
    grid = made.subplots(2, len(roles), sharex="col", squeeze=False)
    look = lines(colours(models))
    for column, role in enumerate(roles):
        for label, spaces in models.items():
            found = [of[role] for of in spaces.values() if role in of]
            ratio = [f["effective_rank_n"] / max(1e-12, f["effective_rank_p"]) for f in found]
            line = {"marker": "o", "markersize": 3.5, **look[label]}
            grid[0][column].plot(range(len(found)), ratio, **line)
            grid[1][column].plot(range(len(found)), [f["overlap"] for f in found], **line)
        grid[1][column].plot(
            range(len(found)), [f["overlap_by_chance"] for f in found], color=BEFORE, linestyle=":", zorder=1.5
        )
        style(grid[0][column], ylabel="" if column else "effective rank, N / P", title=role)
        style(grid[1][column], xlabel="layer", ylabel="" if column else "overlap")
        whole_numbers(grid[1][column].xaxis)
    legend(made, grid[0][0])
    return save(made, path)
