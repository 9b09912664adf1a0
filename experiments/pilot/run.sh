#!/bin/sh
# How often the pilot is right; writes results.json and unseen.json of this folder. Needs runs/pilot/start/model (start.yaml).
#   sh experiments/pilot/run.sh BOOKS
set -eu
on="base.data=$1/train.parquet base.eval_data=$1/validation.parquet"
measure() { # CONFIG LONG SHORT RESULTS
    graftlm compare "$1" $on output_dir="$2"
    # As `graftlm pilot` scales the run down: 5% of 2,125 steps for three pairs and a check, an eighth of a run's
    # sequences assessed.
    graftlm compare "$1" $on base.max_steps=10 base.apex.assess_samples=10 'seeds=[0,1,2,3,4]' output_dir="$3"
    python experiments/pilot/replay.py "$3" "$2" "$4" --faster 'plain at 1.5 x the rate' --pairs 3
}
measure experiments/pilot/config.yaml runs/pilot/long runs/pilot/short experiments/pilot/results.json
measure experiments/pilot/unseen.yaml runs/pilot/long_unseen runs/pilot/short_unseen experiments/pilot/unseen.json
