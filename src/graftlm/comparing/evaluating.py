"""A verb of graftlm that ends with the process that started it: `python -m graftlm.comparing.evaluating eval ...`."""

import sys
import threading

from graftlm.cli import main
from graftlm.training.control import end_with_parent

if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(main(sys.argv[1:]))
