"""Smaller models: which layer loses how much, which components go, and a model class whose layers differ."""
