"""``python -m normkit.cli`` is the command ``normkit``."""

import sys

from normkit.cli import main

sys.exit(main())
