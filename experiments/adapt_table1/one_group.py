"""Which key-value groups Taylor importance takes for weak, and what it costs to remove each.

python experiments/adapt_table1/one_group.py BOOKS/validation.parquet WIKITEXT2/test.txt OUT.json

For every layer: by how much the loss on 2,048 tokens rises when one group is removed, and how often Taylor importance
on 10 and on 64 sequences finds that group the weakest of its layer (draws with different seeds).
"""

import argparse
import copy
from pathlib import Path

import torch

from graftlm.environment import describe_environment
from graftlm.files import write_json
from graftlm.held_out import mean_loss
from graftlm.models import load_model, load_tokenizer
from graftlm.pruning.calibration import calibration_from
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.surgery import keep_components, prunable_blocks
from graftlm.pruning.taylor import taylor
from graftlm.training.config import SourceConfig

DRAWS = {10: 10, 64: 3}
"""Sequences of 64 tokens, and how many sets of so many."""
CONTEXT, CONTEXTS = 1024, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    tokenizer, model = load_tokenizer("smollm2"), load_model("smollm2")
    ids = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8")[: 8 * CONTEXT * CONTEXTS])["input_ids"])
    batches = [{"input_ids": one[None], "labels": one[None]} for one in ids[: CONTEXT * CONTEXTS].view(-1, CONTEXT)]
    blocks = [block for block in prunable_blocks(model) if block.kind == "heads"]
    weakest = {block.name: {count: [0] * block.components for count in DRAWS} for block in blocks}
    for count, draws in DRAWS.items():
        for seed in range(draws):
            settings = PruneSettings(sparsity=0.2, samples=count, seed=seed)
            calibration = calibration_from(tokenizer, settings, [SourceConfig(options.calibration)], progress=False)
            scores = taylor(model, blocks, calibration(0))
            for block in blocks:
                weakest[block.name][count][int(scores[block.name].argmin())] += 1
        print(f"{draws} draws of {count} sequences", flush=True)
    whole = mean_loss(model, batches)
    layers = []
    for block in blocks:
        rises = []
        for group in range(block.components):
            kept = torch.tensor([other for other in range(block.components) if other != group])
            pruned = keep_components(copy.deepcopy(model), {block.name: kept})
            rises.append(round(mean_loss(pruned, batches) - whole, 4))
        layers.append({"layer": block.layer, "loss_rises": rises, "times_weakest": weakest[block.name]})
        print(layers[-1], flush=True)
    told = {"loss": whole, "draws": DRAWS, "layers": layers, "environment": describe_environment()}
    write_json(options.out, told)


if __name__ == "__main__":
    main()
