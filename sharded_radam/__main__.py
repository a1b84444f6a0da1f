"""``python -m sharded_radam``: the command line, for torchrun."""

import sys

from sharded_radam.tools.cli import main

sys.exit(main())
