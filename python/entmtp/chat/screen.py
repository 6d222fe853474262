"""An answer on the terminal: text as it comes, and below it a line that tells how it goes."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from typing import TextIO

from prompt_toolkit.utils import get_cwidth

from ..common.streams import printable

TAB = 8
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
TEXT, ROWS, HEADS, MODEL = "\x1b[36m", "\x1b[34m", "\x1b[32m", "\x1b[35m"  # cyan, blue, green, magenta
ERASE_BELOW, UP = "\x1b[J", "\x1b[A"


def is_colourful() -> bool:
    """Colours are wanted (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def colour_of(drafters: int) -> str:
    """The colour of a token that these drafters guessed (bits of native.abi.SOURCES): of the first of them."""
    return TEXT if drafters & 1 else ROWS if drafters & 2 else HEADS if drafters & 4 else MODEL


class Screen:
    """Writes an answer. On a terminal a status line stays below the text; elsewhere there is the text alone."""

    def __init__(self, file: TextIO = sys.stdout, live: bool = True, colour: bool = True):
        self.file = file
        self.live = live and os.environ.get("TERM") != "dumb"
        self.colour = colour
        self.column = 0
        self.begun = False
        self.ends_line = True  # the text so far does
        self.status = ""
        self.width = self._width()

    @staticmethod
    def _width() -> int:
        return shutil.get_terminal_size().columns

    def set_status(self, line: str) -> None:
        """Show another status line, at the next text."""
        self.width = self._width()
        self.status = line

    def text(self, text: str, drafters: int = 0, soft: bool = False) -> None:
        """Write the next piece of the answer, in a colour if it came from a draft, or softly: what is no answer yet."""
        if not self.begun:
            text = text.lstrip(" ")  # templates leave the space before the first word to the model
        self.begun = self.begun or bool(text)
        if not text:
            return
        if not self.live:
            self.file.write(printable(text) if self.file.isatty() else text)
            self.file.flush()
            self.ends_line = text.endswith("\n")
            return
        text = printable(text)
        colour = colour_of(drafters) if drafters else DIM if soft else ""
        shown = f"{colour}{text}{PLAIN}" if colour and self.colour else text
        self._follow(text)
        self.file.write(ERASE_BELOW + shown + self._below())
        self.file.flush()

    def _follow(self, text: str) -> None:
        """Where the cursor goes."""
        if text.isascii() and text.isprintable():  # nearly always
            self.column = (self.column + len(text) - 1) % self.width + 1
            return
        for c in text:
            if c == "\n":
                self.column = 0
            elif c == "\t":
                self.column = min((self.column // TAB + 1) * TAB, self.width - 1)
            elif not unicodedata.combining(c):
                width = get_cwidth(c)
                if self.column + width > self.width:
                    self.column = 0
                self.column += width

    def _below(self) -> str:
        """The status line, and the way back. A full line has none: there the way back is ambiguous."""
        if not self.status or self.column >= self.width:
            return ""
        status = self.status[: self.width - 1]
        if self.colour:
            status = DIM + status + PLAIN
        right = f"\x1b[{self.column}C" if self.column else ""
        return f"\n\r{status}{UP}\r{right}"

    def end(self) -> None:
        """The answer is complete: the status line goes, and the cursor stands on a new line."""
        if self.live:
            self.file.write(ERASE_BELOW + ("\n" if self.column else ""))
        elif not self.ends_line:
            self.file.write("\n")
        self.file.flush()
        self.column, self.begun, self.ends_line, self.status = 0, False, True, ""


@contextlib.contextmanager
def no_echo() -> Iterator[None]:
    """What is typed while an answer comes is kept for the next question, but not shown in the middle of the text.

    And Ctrl-C drops no output that is on its way: half a status line would stay on the screen.
    """
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
    except (OSError, ValueError, termios.error):
        yield
        return
    quiet = termios.tcgetattr(fd)
    quiet[3] = quiet[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
    termios.tcsetattr(fd, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
