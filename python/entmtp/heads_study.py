"""`python -m entmtp.heads_study`: the name of before of `entmtp bench heads`."""

from .bench.heads_study import main

if __name__ == "__main__":
    raise SystemExit(main())
