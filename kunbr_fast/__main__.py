"""`python -m kunbr_fast` is `kunbr-fast`."""

import sys

from kunbr_fast.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
