"""`python -m graftlm`, the same as the command."""

import sys

from graftlm.cli import main

sys.exit(main())
