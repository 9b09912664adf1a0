"""Better language models out of the parameters they already have.

from graftlm import Apex, ApexConfig, ApexTrainer, ApexSFTTrainer
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftlm.apex import Apex
    from graftlm.apex_config import ApexConfig
    from graftlm.errors import UserError
    from graftlm.training.trainer import ApexMixin, ApexTrainer

__all__ = ["Apex", "ApexConfig", "ApexMixin", "ApexSFTTrainer", "ApexTrainer", "UserError"]

_HOME = {
    "Apex": "graftlm.apex",
    "ApexConfig": "graftlm.apex_config",
    "ApexMixin": "graftlm.training.trainer",
    "ApexSFTTrainer": "graftlm.training.trainer",
    "ApexTrainer": "graftlm.training.trainer",
    "UserError": "graftlm.errors",
}

# Before anything imports peft: with it comes bitsandbytes, which says at every start that a kernel for 4-bit weights is
# missing, and nothing here has such weights.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)


def __getattr__(name: str) -> Any:
    """Imported on first use: torch takes seconds that `graftlm --help` should not."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
