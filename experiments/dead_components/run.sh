#!/bin/sh
# All of this folder's figures; needs runs/pilot/start/model (experiments/pilot/start.yaml).
#   sh experiments/dead_components/run.sh WIKITEXT2 BOOKS
set -eu
here=experiments/dead_components
out=runs/dead_components
on="base.data=$2/train.parquet base.eval_data=$2/validation.parquet"
short="base.max_steps=10 base.apex.assess_samples=10 seeds=[0,1,2,3,4]"
slow='plain at 1.5 x the rate: {method: full, learning_rate: 1.5e-3}'
fast='plain at 1.5 x the rate: {method: full, learning_rate: 4.5e-3}'
sh $here/start.sh "$1"
graftlm compare $here/config.yaml $on
graftlm compare $here/config.yaml $on $short output_dir=$out/short
graftlm compare $here/config.yaml $on base.model=$out/drawn_anew "variants={$slow}" output_dir=$out/drawn_anew_long
both="split: {method: apex, apex.start: split}, $fast"
graftlm compare $here/config.yaml $on base.learning_rate=3e-3 "variants={$both}" output_dir=$out/long_3e-3
graftlm compare $here/config.yaml $on base.learning_rate=3e-3 "variants={$both}" $short output_dir=$out/short_3e-3
graftlm compare $here/config.yaml $on base.model=$out/drawn_anew base.learning_rate=3e-3 'variants={the same: {method: full}}' \
    output_dir=$out/drawn_anew_long_3e-3
for rate in '' _3e-3; do
    python experiments/pilot/replay.py $out/short$rate $out/long$rate $here/pilot${rate:-_1e-3}.json \
        --faster 'plain at 1.5 x the rate' --pairs 3
done
