"""Processes that are forked: threads that compute passes do not come along."""

from __future__ import annotations

import os

from .errors import EntmtpError

_computed = False  # with several threads, in this process or the one that it was forked from
_is_lost = False


def _forked() -> None:
    global _is_lost
    _is_lost = _computed


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def check_threads(n: int) -> None:
    """Before a pass on n threads.

    Raises:
        EntmtpError: OpenMP would wait for ever, for threads that the process before the fork had.
    """
    global _computed
    if n == 1:
        return
    if _is_lost:
        raise EntmtpError(
            "this process was forked after a model had computed on several threads, which are not in it: start it by "
            "spawn (multiprocessing.set_start_method), or compute on one thread (n_threads=1, n_threads_batch=1)"
        )
    _computed = True
