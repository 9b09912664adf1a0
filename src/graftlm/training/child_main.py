"""What a process that child.py starts runs: `python -m graftlm.training.child_main CONFIG.yaml [--resume] [--lean]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from graftlm.configuring import load_config
from graftlm.errors import UserError
from graftlm.training.child import end_with_parent
from graftlm.training.run import train_one


def main(arguments: Sequence[str]) -> int:
    """Run train_one on the config file that is named; returns the exit status."""
    end_with_parent()
    try:
        train_one(load_config(Path(arguments[0])), resume="--resume" in arguments, lean="--lean" in arguments)
    except UserError as error:
        print(f"graftlm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
