"""Word perplexity by the number of turns: each trial a point, each kind of training a line through the geometric means.

graftlm compare experiments/adapt_fig4/config.yaml ...  # as its first lines say; leaves runs/adapt_fig4/comparison.json
python experiments/adapt_fig4/draw.py runs/adapt_fig4/comparison.json experiments/adapt_fig4/turns.png
"""

import sys
from pathlib import Path
from statistics import geometric_mean

from graftlm.files import read_json
from graftlm.reporting.style import colours, figure, legend, save, style

KINDS = {"": "new optimizer a turn", "moments kept": "moments kept", "by loss": "heads by loss, 64 sequences"}


def main() -> None:
    comparison, out = map(Path, sys.argv[1:])
    found: dict[str, dict[int, list[float]]] = {label: {} for label in KINDS.values()}
    for row in read_json(comparison)["rows"]:
        (measured,) = (one["word"] for one in row["perplexity"].values())
        turns, _, kind = row["name"].partition(", ")
        if measured:
            count = 1 if turns == "at once" else int(turns.removesuffix(" turns"))
            found[KINDS[kind]][count] = list(measured["by_seed"].values())
    made = figure(
        "Word perplexity by the number of turns",
        note="SmolLM2-135M without 40% of its heads and channels; the same 41 thousand tokens of training for all.",
    )
    axes = made.subplots()
    for (label, turns), colour in zip(found.items(), colours(found).values(), strict=True):
        counts = sorted(turns)
        axes.plot(counts, [geometric_mean(turns[n]) for n in counts], "-", color=colour, label=label)
        for n in counts:
            axes.plot([n] * len(turns[n]), turns[n], "o", color=colour, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(every := sorted({n for turns in found.values() for n in turns}), map(str, every))
    style(axes, xlabel="times pruned and trained", ylabel="word perplexity, WikiText-2's test text")
    legend(made, axes)
    save(made, out)


if __name__ == "__main__":
    main()
