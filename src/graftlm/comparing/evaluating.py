"""A verb of graftlm that ends with the process that started it: `python -m graftlm.comparing.evaluating eval ...`."""

import sys

from graftlm.cli import main
from graftlm.training.child import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(sys.argv[1:]))
