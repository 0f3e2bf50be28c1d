"""``python -m vpfast`` is ``vpfast``."""

import sys

from vpfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
