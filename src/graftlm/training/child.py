"""Training in a process of its own, which ends with the one that started it."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from graftlm.training.arguments import GIVEN, TENSORBOARD


def start_training(config: Path, *, resume: bool, lean: bool = False, **streams: Any) -> "subprocess.Popen[bytes]":
    """A process that runs train_one on a config file (child_main.py), and ends with this one.

    streams: stdout, stderr, as Popen's.
    """
    flags = [*(["--resume"] if resume else []), *(["--lean"] if lean else [])]
    command = [sys.executable, "-m", "graftlm.training.child_main", str(config), *flags]
    environment = {key: value for key, value in os.environ.items() if key != TENSORBOARD or key in GIVEN}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, **streams)


def end_with_parent() -> None:
    """From now on, leave when the pipe to the parent closes: killed with -9, it could not tell, and a control left
    behind would write beside the one that --resume starts."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):  # not sys.stdin.read: Python would wait for it when it ends
        pass
    os._exit(1)
