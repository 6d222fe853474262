"""Progress bars for long work, where somebody looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars, one per stage: yields what is called with stage, done and total."""
    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        jobs: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in jobs:
                jobs[stage] = progress.add_task(stage)
            progress.update(jobs[stage], completed=done, total=total)

        yield advance


@contextmanager
def progress_bar(done: int, total: int) -> Iterator[Callable[[], None]]:
    """On stderr, where that is a terminal; yields what counts one more."""
    console = Console(stderr=True)
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        job = bar.add_task("answers", total=total, completed=done)
        yield lambda: bar.advance(job)
