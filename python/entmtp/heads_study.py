"""`python -m entmtp.heads_study`: the name of before of `entmtp bench heads`."""

import sys

from .bench.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["heads", *sys.argv[1:]]))
