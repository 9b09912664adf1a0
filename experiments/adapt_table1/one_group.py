"""Which key-value groups Taylor importance takes for weak, and what it costs to remove each.

python experiments/adapt_table1/one_group.py BOOKS/validation.parquet WIKITEXT2/test.txt OUT.json

For every layer: by how much the loss on 2,048 tokens rises when one group is removed, and how often Taylor importance
on 10 and on 64 sequences finds that group the weakest of its layer (draws with different seeds).
"""

from given import read_arguments

from graftlm.environment import describe_environment
from graftlm.files import write_json
from graftlm.held_out import mean_loss
from graftlm.pruning.ablation import ablation
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.surgery import prunable_blocks
from graftlm.pruning.taylor import taylor

DRAWS = {10: 10, 64: 3}
"""Sequences of 64 tokens, and how many sets of so many."""


def main() -> None:
    given = read_arguments(__doc__, contexts=2)
    model = given.model
    blocks = [block for block in prunable_blocks(model) if block.kind == "heads"]
    weakest = {block.name: {count: [0] * block.components for count in DRAWS} for block in blocks}
    for count, draws in DRAWS.items():
        for seed in range(draws):
            calibration = given.calibration(PruneSettings(sparsity=0.2, samples=count, seed=seed))
            scores = taylor(model, blocks, calibration(0))
            for block in blocks:
                weakest[block.name][count][int(scores[block.name].argmin())] += 1
        print(f"{draws} draws of {count} sequences", flush=True)
    rises = ablation(model, blocks, given.batches)
    layers = [
        {
            "layer": block.layer,
            "loss_rises": [round(rise, 4) for rise in rises[block.name].tolist()],
            "times_weakest": weakest[block.name],
        }
        for block in blocks
    ]
    loss = mean_loss(model, given.batches)
    write_json(given.out, {"loss": loss, "draws": DRAWS, "layers": layers, "environment": describe_environment()})


if __name__ == "__main__":
    main()
