"""Several ways of pruning beside one another, at equal numbers of parameters."""
