#!/bin/sh
# Adapt-Pruner, figure 1. Above: the perplexity without half of one layer, for every layer, on three sets of sequences.
# Below (what each layer of the pruned models has left): plots/layers_*.png of experiments/adapt_table1.
#   sh experiments/adapt_fig1/run.sh BOOKS
set -eu
for split in train validation test; do
    graftlm assess smollm2 --data "$1/$split.parquet" --out "runs/adapt_fig1/$split" \
        --samples 16 --max-length 128 --prune-sensitivity 0.5
done
