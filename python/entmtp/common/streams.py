"""A command's way to its terminal: closed ones, and readers who leave."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable


def run_command(main: Callable[[], int]) -> int:
    """The exit code of a command, whose output may be a closed one or a pipe that is read no more.

    Python has None in place of a stream that is closed at the start, and complains where it cannot flush at the end.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        stream = getattr(sys, name)
        if mode == "w" and hasattr(stream, "reconfigure"):  # a terminal of ASCII shows \u2026
            stream.reconfigure(errors="backslashreplace")
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
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        leave()
        print(f"entmtp: what is written has no room: {(e.strerror or str(e)).lower()}", file=sys.stderr)
        return 1


def printable(text: str) -> str:
    """Text without the control characters by which a model, or a name in a file, could take hold of the terminal."""
    if text.isprintable():
        return text
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda m: f"\\x{ord(m[0]):02x}", text)


def leave() -> None:
    """Nobody reads what is written any more; Python would complain once more when it flushes."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
