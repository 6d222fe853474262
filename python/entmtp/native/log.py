"""What llama.cpp says: on stderr, all of it where llama-cpp-python is verbose, else errors; or kept for a sentence."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator

import llama_cpp
from llama_cpp import _logger

from ..common.errors import NO_CONTEXT

# enum ggml_log_level; llama-cpp-python reads an older one, by which warnings are errors and errors are nothing
LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
CONTINUED = 5  # belongs to the message before
# what llama.cpp reports as an error where a pass was stopped (GGML_STATUS_ABORTED), which is none
STOPPED = (b"compute status: 1\n", b"failed with error 1\n")


class _State(threading.local):
    shown = False  # the last message
    error = ""  # the last one that was an error
    kept: list[str] | None = None  # instead of shown


_state = _State()


@llama_cpp.llama_log_callback
def log(level: int, text: bytes, _: object) -> None:
    """Called by llama.cpp, in the thread that has something to say."""
    said = text.decode("utf-8", "replace")
    if LEVELS.get(level) == logging.ERROR:
        _state.error = said.strip()
    if _state.kept is not None:
        _state.kept.append(said)
        return
    if level != CONTINUED:
        quiet = _logger.logger.level > logging.DEBUG
        _state.shown = _logger.logger.level <= LEVELS.get(level, logging.DEBUG) and not (
            quiet and text.endswith(STOPPED)
        )
    if _state.shown:
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            print(said, end="", flush=True, file=sys.stderr)


llama_cpp.llama_log_set(log, None)


@contextlib.contextmanager
def kept() -> Iterator[list[str]]:
    """What llama.cpp says in this thread, in place of showing it: it may repeat what a client wrote."""
    before, _state.kept = _state.kept, []
    try:
        yield _state.kept
    finally:
        _state.kept = before


def last_error() -> str:
    """The last error that llama.cpp reported in this thread since `forget`."""
    return _state.error


def forget() -> None:
    _state.error = ""


@contextlib.contextmanager
def said() -> Iterator[None]:
    """Why a context cannot be made, as llama.cpp says it, is in the error, too."""
    forget()
    try:
        yield
    except ValueError as e:
        if "llama_context" not in str(e):
            raise
        why = (
            _state.error.partition(": ")[2]
            or "memory may be too small, or the model cannot have such a cache"
        )
        raise ValueError(f"{NO_CONTEXT}: {why}") from e
