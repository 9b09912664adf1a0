#!/bin/sh
# A model with dead components: experiments/pilot's start, pruned by 40% and padded with zeros to the shape it had, and the
# same with the dead rows drawn anew.
#   sh experiments/dead_components/start.sh WIKITEXT2
set -eu
graftlm prune runs/pilot/start/model --sparsity 0.4 --data "$1/valid.txt" --out runs/dead_components/pruned
graftlm export runs/dead_components/pruned --format padded --out runs/dead_components/padded
python experiments/dead_components/draw_anew.py runs/dead_components/padded runs/dead_components/drawn_anew
