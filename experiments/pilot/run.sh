#!/bin/sh
# How often the pilot is right; writes experiments/pilot/results.json. Needs runs/pilot/start/model (start.yaml).
#   sh experiments/pilot/run.sh BOOKS
set -eu
on="base.data=$1/train.parquet base.eval_data=$1/validation.parquet"
graftlm compare experiments/pilot/config.yaml $on
# As `graftlm pilot` scales the run down: 5% of 2,125 steps for three pairs and a check, an eighth of a run's sequences
# assessed.
graftlm compare experiments/pilot/config.yaml $on base.max_steps=10 base.apex.assess_samples=10 'seeds=[0,1,2,3,4]' \
    output_dir=runs/pilot/short
python experiments/pilot/replay.py runs/pilot/short runs/pilot/long experiments/pilot/results.json \
    --faster 'plain at 1.5 x the rate' --pairs 3
