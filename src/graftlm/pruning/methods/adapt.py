"""Adapt-Pruner: each layer loses what its importance leaves it to lose, in many small iterations (section 3.1)."""

from graftlm.pruning.prune import ranked_by
from graftlm.pruning.taylor import taylor

prune = ranked_by(taylor)
