"""`python -m lorabank.cli`: the same as the command `lorabank`."""

import sys

from lorabank.cli import main

if __name__ == "__main__":
    sys.exit(main())
