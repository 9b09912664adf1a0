"""Runs: data, trainer, checkpoints."""
