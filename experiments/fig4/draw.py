"""Figure 4: held-out loss by the share of components that expand, and each share against none.

python experiments/fig4/draw.py runs/fig4/comparison.json experiments/fig4/loss_by_k.png
"""

import sys
from pathlib import Path

from graftlm.comparing.statistics import difference
from graftlm.files import read_json
from graftlm.reporting.style import colours, figure, legend, save, style

NONE = "0%"


def main() -> None:
    comparison, out = map(Path, sys.argv[1:])
    losses = {arm["name"]: arm["loss"]["by_seed"] for arm in read_json(comparison)["arms"]}
    control, shares = losses.pop("control"), [float(name.removesuffix("%")) for name in losses if name != "control"]
    for name, found in losses.items():
        if name != NONE:
            gap = difference([found[seed] - losses[NONE][seed] for seed in found])
            low, high = gap.t_interval
            print(f"{name} minus {NONE}: {gap.mean:+.4f} ({low:+.4f} to {high:+.4f})")
    made = figure(
        "Held-out loss by K", note="Dotted: plain training of everything with the same seed. 0%: no expansion."
    )
    axes = made.subplots()
    palette = colours(f"seed {seed}" for seed in control)
    for seed, colour in zip(control, palette.values(), strict=True):
        axes.plot(shares, [found[seed] for found in losses.values()], "o-", color=colour, label=f"seed {seed}")
        axes.axhline(control[seed], color=colour, linestyle=":")
    style(axes, xlabel="K, % of channels (of heads always one key-value group of three)", ylabel="nats a token")
    legend(made, axes)
    save(made, out)


if __name__ == "__main__":
    main()
