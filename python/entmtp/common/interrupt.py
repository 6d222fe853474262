"""Ctrl-C stops an answer, not the program."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def ctrl_c_stops(cancel: Callable[[], None]) -> Iterator[threading.Event]:
    """Within the block, Ctrl-C calls `cancel` at once, from another thread; yields what tells that it did.

    Python runs signal handlers between its own instructions, which is too late while llama.cpp works through a long
    prompt. So a thread waits for the byte that the interpreter writes the moment a signal comes, and cancels.
    Must be entered in the main thread.
    """
    stopped = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while data := reader.recv(64):
            if signal.SIGINT in data:
                stopped.set()
                cancel()

    # llama.cpp would report the interrupted pass on stderr, in the middle of the text
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(max(level, logging.CRITICAL))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    handler = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield stopped
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, handler)
        writer.close()
        thread.join()
        reader.close()
        logger.setLevel(level)


@contextlib.contextmanager
def heeded(note: Callable[[BaseException], None]) -> Iterator[None]:
    """Within this a Ctrl-C is told to `note` where it comes while a library calls back into Python: no exception leaves
    there, and it would be lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = sys.unraisablehook

    def told(args: Any) -> None:
        if isinstance(args.exc_value, KeyboardInterrupt):
            note(args.exc_value)
        else:
            before(args)

    sys.unraisablehook = told
    try:
        yield
    finally:
        sys.unraisablehook = before
