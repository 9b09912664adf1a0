#!/bin/sh
# Figures 6 to 9: trains with APEX and plainly, three seeds each, then assesses every model beside the one that all start from.
#   sh experiments/fig6/run.sh
set -eu
graftlm compare experiments/fig6/config.yaml
for model in runs/fig6/cells/*/model; do
    graftlm assess runs/healing/model --compare "$model" --data runs/table1/data/held_out.jsonl --samples 64 \
        --max-length 512 --out "runs/fig6/assessed/$(basename "$(dirname "$model")")"
done
python experiments/fig6/summarise.py runs/fig6/assessed experiments/fig6
