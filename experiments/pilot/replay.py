"""What a pilot on short runs says, beside what long ones say.

python experiments/pilot/replay.py SHORT LONG OUT.json --faster ARM --pairs 3 [--minimum-effect 0.002]

SHORT and LONG: folders of two comparisons with the same arms, of which --faster is plain training at a higher rate.
"""

import argparse
import dataclasses
from pathlib import Path

from graftlm.comparing.verdict import MINIMUM_EFFECT, replay_comparison
from graftlm.files import read_json, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("short", type=Path)
    parser.add_argument("long", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--faster", required=True)
    parser.add_argument("--pairs", type=int, required=True, help="at most")
    parser.add_argument("--minimum-effect", type=float, default=MINIMUM_EFFECT)
    options = parser.parse_args()
    short, long = (read_json(folder / "comparison.json") for folder in (options.short, options.long))
    found = replay_comparison(
        short, long, faster=options.faster, minimum_effect=options.minimum_effect, pairs=options.pairs
    )
    gains = {arm["name"]: arm["difference"] for arm in long["arms"] if arm.get("difference")}
    for one in found:
        low, high = (-end for end in reversed(gains[one.name]["t_interval"]))
        over = one.verdict.over_faster
        checked = "" if over is None else f", {over:+.4f} over faster"
        told = f"pilot {one.verdict.answer} ({one.verdict.gain:+.4f}, {one.verdict.pairs} pairs{checked})"
        print(f"{one.name:16} {told:60} truth {one.truth} ({low:+.4f} to {high:+.4f})")
    known = [one for one in found if one.right is not None]
    wrong = [one for one in known if one.verdict.answer not in ("undecided", one.truth)]
    right = sum(bool(one.right) for one in known)
    print(f"{right} of {len(known)} right, {len(wrong)} wrong, {len(known) - right - len(wrong)} undecided")
    write_json(
        options.out,
        {
            "minimum_effect": options.minimum_effect,
            "pairs": options.pairs,
            "faster": gains[options.faster],
            "cases": [{**dataclasses.asdict(one), "right": one.right, "long": gains[one.name]} for one in found],
            "hardware": long["hardware"],
            "versions": long["versions"],
            "date": long["date"],
        },
    )


if __name__ == "__main__":
    main()
