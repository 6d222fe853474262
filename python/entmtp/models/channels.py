"""Answers of gpt-oss: thoughts, text and calls, each in a channel of its own between tags.

The prompt ends with `<|start|>assistant`, and the answer goes on with messages like
`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…`. A call names its function in
what stands before `<|message|>`: ` to=functions.NAME`. The form is that of the model's chat template; llama.cpp writes
these tags as text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

TAGS, THOUGHT, TEXT, CALL = "tags", "thought", "text", "call"
CHANNEL = "<|channel|>"  # begins an answer in channels, behind TO if its first message is to somebody
TO = re.compile(r" to=[^\s<]*\s?")
MESSAGE = "<|message|>"
ENDS = re.compile(r"<\|(?:end|call|return)\|>|(?=<\|(?:start|channel)\|>)")
LONGEST = 11  # characters of a tag
HEAD = 256  # characters of what stands before a message, at most
NAMED = re.compile(r"<\|channel\|>\s*(\w+)")


class Piece(NamedTuple):
    """Some of an answer; the texts of all pieces are the answer's.

    Attributes:
        kind: TAGS, THOUGHT, TEXT, or CALL: a function's arguments as JSON.
        function: that is called.
    """

    kind: str
    text: str
    function: str = ""


class Channels:
    """Tells the pieces of an answer apart as it comes. An answer without channels is text.

    Attributes:
        found: the answer has channels.
    """

    found = False

    def __init__(self) -> None:
        self._held = ""
        self._kind = TAGS  # of what comes next
        self._function = ""
        self._begun = False

    def add(self, text: str, last: bool) -> list[Piece]:
        """What the next piece of the text makes certain; a call is told when it is whole.

        Args:
            last: the answer ends with it.
        """
        if self._begun and not self.found:
            return [Piece(TEXT, text)] if text else []
        n_new = len(text)
        self._held += text
        if not self._begun:
            to = TO.match(self._held)
            start = self._held[to.end() if to else 0 :]
            self.found = start.startswith(CHANNEL)
            may_be = CHANNEL.startswith(start) or " to=".startswith(self._held)
            if not self.found and may_be and not last:
                return []
            self._begun = True
            if not self.found:
                return self._take(len(self._held), TEXT)
        found: list[Piece] = []
        while self._held:
            before = self._kind, len(self._held)
            found += self._head(last) if self._kind == TAGS else self._body(last, n_new)
            if before == (self._kind, len(self._held)):
                break
            n_new = len(self._held)
        return found

    def _take(self, n: int, kind: str) -> list[Piece]:
        """The first n characters of what is held."""
        text, self._held = self._held[:n], self._held[n:]
        return [Piece(kind, text, self._function if kind == CALL else "")] if text else []

    def _head(self, last: bool) -> list[Piece]:
        end = self._held.find(MESSAGE)
        if end < 0:
            return self._take(len(self._held), TAGS) if last or len(self._held) > HEAD else []
        head = self._held[:end]
        to = [word.strip()[len("to=") :] for word in TO.findall(head) if word.strip() != "to=assistant"]
        self._function = to[-1].removeprefix("functions.") if to and to[-1].startswith("functions.") else ""
        # calls of the tools that its maker has for it are thoughts, too
        thought = bool(to) or NAMED.findall(head)[-1:] == ["analysis"]
        self._kind = CALL if self._function else THOUGHT if thought else TEXT
        return self._take(end + len(MESSAGE), TAGS)

    def _body(self, last: bool, n_new: int) -> list[Piece]:
        end = ENDS.search(self._held, max(0, len(self._held) - n_new - LONGEST))
        if end is None:
            if last:
                return self._take(len(self._held), self._kind)
            begun = self._held.rfind("<", max(0, len(self._held) - LONGEST))
            whole = begun if begun >= 0 else len(self._held)
            return [] if self._kind == CALL else self._take(whole, self._kind)
        found = self._take(end.start(), self._kind)
        self._kind = TAGS
        return found + self._take(end.end() - end.start(), TAGS)
