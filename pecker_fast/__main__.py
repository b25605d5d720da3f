"""``python -m pecker_fast``: the command ``pecker-fast``, also for ``torchrun -m pecker_fast``."""

import sys

from pecker_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
