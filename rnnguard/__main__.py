"""`python -m rnnguard`: the command line."""

import sys

from rnnguard.cli import main

sys.exit(main())
