"""A person at a terminal: a command runs in one, keys are pressed, and the screen is read."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import pexpect
import pyte


class Terminal:
    """`python -m <module>` in a terminal of its own.

    Attributes:
        raw: everything it wrote, escape sequences included.
        n_reads: how often something came.
    """

    def __init__(self, *command: str, rows: int = 40, columns: int = 100, env: dict[str, str] | None = None):
        self.screen = pyte.HistoryScreen(columns, rows, history=5000)
        self.screen.write_process_input = self._answer  # where is the cursor?
        self.stream = pyte.Stream(self.screen)
        self.raw = ""
        self.n_reads = 0
        self.child = pexpect.spawn(
            sys.executable, ["-m", *command], dimensions=(rows, columns), encoding="utf-8", timeout=60,
            env={**(os.environ if env is None else env), "TERM": "xterm-256color"},
        )  # fmt: skip

    def _answer(self, data: str) -> None:
        self.child.send(data)

    def read(self) -> bool:
        """Take in what came, waiting a little. False at the end."""
        try:
            data = self.child.read_nonblocking(65536, timeout=0.1)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self.n_reads += 1
        self.stream.feed(data)
        return True

    def text(self) -> str:
        """What a person sees who scrolls up, without the lines' trailing spaces."""
        lines = [
            "".join(line[i].data for i in range(self.screen.columns)) for line in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*lines, *self.screen.display]).rstrip()

    def wait(self, part: str, after: str = "", seconds: float = 90) -> str:
        """Read until the text after the last `after` holds a part; returns the text from there on."""
        return self.wait_for(lambda text: part in text, after, seconds, part)

    def wait_for(self, seen: Any, after: str = "", seconds: float = 90, what: str = "it") -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            alive = self.read()
            text = self.text()
            text = (
                text[text.rindex(after) + len(after) :] if after and after in text else "" if after else text
            )
            if seen(text):
                return text
            if not alive:
                break
        raise AssertionError(f"waited for {what!r}; the screen shows\n{self.text()}")

    def send(self, keys: str) -> None:
        self.child.send(keys)

    def line(self, text: str) -> None:
        self.child.send(text + "\r")

    def wait_end(self) -> int:
        """The exit status."""
        while self.read():
            pass
        self.child.close()
        return -(self.child.signalstatus or 0) or self.child.exitstatus or 0

    def close(self) -> None:
        self.child.close(force=True)
