"""Which choices tell prunings of one size apart: each model with single blocks of the other's components.

python experiments/adapt_table1/which_block.py BOOKS/validation.parquet WIKITEXT2/test.txt OUT.json

At 40%, seed 0: Adapt-Pruner at once on 64 sequences against the same in 50 steps of 10 and in 5 of 64. Loss in nats a
token on 4,096 tokens.
"""

import copy
from collections.abc import Mapping

from given import read_arguments
from torch import Tensor

from graftlm.environment import describe_environment
from graftlm.files import write_json
from graftlm.held_out import mean_loss
from graftlm.pruning.prune import prune
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.surgery import keep_components

AT_ONCE = PruneSettings(sparsity=0.4, preset="at-once", heads_by="method")
OTHERS = {
    "5 steps of 64": PruneSettings(sparsity=0.4, iterations=5, amplitude=0.2, samples=64),
    "50 steps of 10": PruneSettings(sparsity=0.4, iterations=50),
}
Kept = Mapping[str, Tensor]


def main() -> None:
    given = read_arguments(__doc__, contexts=4)
    model = given.model

    def kept_by(settings: PruneSettings) -> Kept:
        return prune(copy.deepcopy(model), settings, given.calibration(settings)).kept

    def loss(kept: Kept) -> float:
        return round(mean_loss(keep_components(copy.deepcopy(model), kept), given.batches), 4)

    ours = kept_by(AT_ONCE)
    told = {"at once": loss(ours), "others": {}, "environment": describe_environment()}
    print(f"at once: {told['at once']}", flush=True)
    for name, settings in OTHERS.items():
        theirs = kept_by(settings)
        heads = [block for block in ours if "heads" in block]
        found = {
            "loss": loss(theirs),
            "at once, with their heads": loss({**ours, **{block: theirs[block] for block in heads}}),
            "at once, with their channels": loss({**theirs, **{block: ours[block] for block in heads}}),
            "blocks": [
                {
                    "block": block,
                    "at once": ours[block].tolist(),
                    "theirs": theirs[block].tolist(),
                    "at once, with theirs": loss({**ours, block: theirs[block]}),
                    "theirs, with that of at once": loss({**theirs, block: ours[block]}),
                }
                for block in heads
                if ours[block].tolist() != theirs[block].tolist()
            ],
        }
        told["others"][name] = found
        print(name, found, flush=True)
        write_json(given.out, told)


if __name__ == "__main__":
    main()
