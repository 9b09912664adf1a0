"""LLM-Pruner (Ma et al., 2023): Taylor importance, every layer the same share, in one step.

As Adapt-Pruner's tables compare with it: all layers are pruned (its authors spare a model's first and last), and a
key-value group is credited with its own query heads.
"""

from graftlm.pruning.prune import ranked_by
from graftlm.pruning.taylor import taylor

prune = ranked_by(taylor)
