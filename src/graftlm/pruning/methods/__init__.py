"""Ways of pruning, one module each: `prune(model, settings, calibration, heard) -> Pruned` (base.PruningMethod)."""

import importlib
from typing import cast

from graftlm.pruning.base import PruningMethod
from graftlm.pruning.settings import MethodName

MODULES: dict[MethodName, str] = {
    "adapt": "adapt",
    "llm-pruner": "llm_pruner",
    "flap": "flap",
    "slicegpt": "slicegpt",
    "shortgpt": "shortgpt",
    "minitron": "minitron",
    "sheared": "sheared",
    "magnitude": "magnitude",
    "random": "random",
    "wina": "wina",
}
"""Method -> its module here."""


def method(name: MethodName) -> PruningMethod:
    """The way of pruning called `name`; its module is imported only now."""
    module = importlib.import_module(f"{__name__}.{MODULES[name]}")
    return cast(PruningMethod, module.prune)
