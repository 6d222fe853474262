"""A command's way to its terminal: closed ones, and readers who leave."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def run_command(main: Callable[[], int]) -> int:
    """The exit code of a command, whose output may be a closed one or a pipe that is read no more.

    Python has None in place of a stream that is closed at the start, and complains where it cannot flush at the end.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()  # --help leaves by an exception
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `entmtp doctor | head`
        leave()
        return 1


def leave() -> None:
    """Nobody reads what is written any more; Python would complain once more when it flushes."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
