"""Give dead heads and channels new rows, so that plain training can use them, without a change of the output.

python experiments/dead_components/draw_anew.py MODEL OUT

A component that is zeros in every matrix gets no gradient. Here its rows (values, gate, up) are drawn like those of the
living ones, and its columns (output and down projections) stay zero.
"""

import argparse

import torch

from graftlm.anatomy import linear, read_anatomy
from graftlm.models import load_model, load_tokenizer, save_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    options = parser.parse_args()
    model, generator = load_model(options.model), torch.Generator().manual_seed(0)
    for block in read_anatomy(model, smallest=1).blocks:
        output = linear(model, block.output.module).weight.detach()
        columns = [block.output.index(torch.tensor([one])).flatten() for one in range(block.components)]
        dead = torch.tensor([one for one, own in enumerate(columns) if not output[:, own].any()], dtype=torch.int64)
        for matrix in (*block.mixed, *block.followers):
            weight = linear(model, matrix.module).weight.data
            if matrix.dim == 0 and len(dead):
                rows = matrix.index(dead).flatten()
                alive = weight[weight.abs().sum(1) > 0]
                weight[rows] = alive.std() * torch.randn(len(rows), weight.shape[1], generator=generator)
        print(f"{block.name}: {len(dead)} of {block.components} drawn anew")
    save_model(model, load_tokenizer(options.model), options.out)


if __name__ == "__main__":
    main()
