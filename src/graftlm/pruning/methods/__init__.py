"""Ways of pruning, one module each: `prune(model, settings, calibration, heard) -> Pruned` (base.PruningMethod)."""

import importlib
from typing import cast

from graftlm.pruning.base import PruningMethod
from graftlm.pruning.settings import MethodName
from graftlm.pruning.ways import WAYS


def method(name: MethodName) -> PruningMethod:
    """The way of pruning called `name`; its module is imported only now."""
    module = importlib.import_module(f"{__name__}.{WAYS[name].module}")
    return cast(PruningMethod, module.prune)
