"""Whether Triton's kernels run here."""

import functools
import importlib.util
import logging
import os

logger = logging.getLogger(__name__)
SWITCH = "GRAFTLM_TRITON"
"""Environment variable; 0: PyTorch's own operations in the place of Triton's kernels."""


@functools.cache
def triton_works() -> bool:
    """True where Triton is installed and can compile: at first use it builds a part of itself, for which it needs a C
    compiler and Python's headers, and a slim container has neither. Says so once, and what to do."""
    if os.environ.get(SWITCH) == "0" or importlib.util.find_spec("triton") is None:
        return False
    try:
        from triton.runtime import driver

        driver.active.get_current_device()
    except Exception as error:  # whatever its build raises: there is a way without it
        logger.warning(
            "Triton is installed and does not run (%s), so the kernels of APEX are PyTorch's own, which take longer; "
            "install a C compiler and Python's headers (gcc, python3-dev), or set %s=0 to be rid of this line",
            " ".join(str(error).split())[:200],
            SWITCH,
        )
        return False
    return True
