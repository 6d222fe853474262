"""What `entmtp.train` shows: a progress bar per phase on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Screen:
    """A progress bar per phase on a terminal; elsewhere a line now and then."""

    def __init__(self, show: bool):
        self.console = Console(stderr=True, quiet=not show)
        self.live = self.console.is_terminal

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Yields what is called with the work done so far and a text beside it."""
        begin = time.monotonic()
        said, first, ended = begin, -1, False  # work that was there already tells nothing about speed
        columns = (
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console, disable=not self.live) as bar:
            task = bar.add_task(name, total=total, text="")

            def advance(done: int, text: str = "") -> None:
                nonlocal said, first, ended
                first = done if first < 0 else first
                bar.update(task, completed=done, text=text)
                now = time.monotonic()
                if not self.live and not ended and (now - said > 20 or done >= total):
                    said, ended = now, done >= total
                    left = (now - begin) * (total - done) / max(done - first, 1)
                    self.say(f"{name}: {100 * done // max(total, 1)}% {text} ({left / 60:.1f} min left)")

            yield advance


def with_speed(advance: Callable[[int, str], None]) -> Callable[[int], None]:
    begin, first = time.monotonic(), -1

    def call(done: int) -> None:
        nonlocal first
        first = done if first < 0 else first
        advance(done, f"{(done - first) / max(time.monotonic() - begin, 1e-9):.0f} tokens/s")

    return call
