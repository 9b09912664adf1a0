"""Adapt-Accel: prune a little, train, and again, to an exact size (Adapt-Pruner, section 3.2)."""
