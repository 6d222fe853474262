"""The one exception of the converter."""

from __future__ import annotations

_MAX_CHARS = 800


class ConvertError(Exception):
    """A conversion that cannot be done; its text is one sentence for the user: what, where and how to mend it.

    Names from damaged or hostile files end up in that text, so it is kept to one printable line.
    """

    def __init__(self, sentence: str):
        line = "".join(c if c.isprintable() else "?" for c in sentence)
        super().__init__(line if len(line) <= _MAX_CHARS else line[:_MAX_CHARS] + " ...")
