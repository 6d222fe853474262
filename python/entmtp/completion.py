"""One completion on its way: its tokens, where a stop string ends it, and its text, whole or streamed.

llama-cpp-python writes completions; what is here instead of there: stop strings are looked for in the bytes of the
text, the earliest one counts, and a stream is the whole answer in pieces.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from .request import LONGEST_REST, most_tokens

HALF = "\ufffd".encode()  # of a character, as some tokenizers write it until the rest is there


class Writer(Protocol):
    """What is asked of a model."""

    def detokenize(self, tokens: Any, prev_tokens: Any = None) -> bytes: ...
    def ends_text(self, token: int) -> bool: ...


class AtLeast:
    """A logits processor: no end of the text before so many tokens of one answer.

    Args:
        ends: tokens that end a text.
    """

    def __init__(self, n_tokens: int, ends: Sequence[int]):
        self._n_tokens, self._ends, self._n_prompt = n_tokens, list(ends), -1

    def __call__(self, tokens: Any, logits: Any) -> Any:
        if self._n_prompt < 0:
            self._n_prompt = len(tokens)
        if len(tokens) - self._n_prompt < self._n_tokens:
            logits = logits.copy()
            logits[self._ends] = -np.inf
        return logits


class Ending:
    """A completion's stopping criteria, and whether its generation ended before it was told to.

    llama-cpp-python asks them once more behind the last token, and leaves an answer without its text where nothing
    ended it: neither a limit, nor an end of text, nor they. It looks at no limit while a character is not complete.

    Args:
        asked: arguments of `create_completion`, by name.
        record: what keeps log probabilities on the way (`Logprobs`), None for nothing.
        first: tokens that llama-cpp-python has an answer begin with.

    Attributes:
        stops: criteria of the user, None for none.
        most: tokens that were asked for at most, None without a limit.
        early: it was cancelled, or nothing more fits, or is allowed, in the middle of a character; set by `generate`.
        cut: bytes of the text before a stop string, None where none came.
    """

    def __init__(self, llm: Writer, asked: dict[str, Any], record: Any = None, first: Sequence[int] = ()):
        self._llm, self.record, self.early = llm, record, False
        self.stops: Callable[[Any, Any], bool] | None = asked.get("stopping_criteria")
        self._was_told = False  # by them
        self.streamed, self.most = bool(asked.get("stream")), most_tokens(asked)
        stop = asked.get("stop") or []
        # as in llama.cpp, an empty one is none
        self._strings = [s.encode() for s in ([stop] if isinstance(stop, str) else stop) if s]
        self._follows = bool(self._strings) or self.streamed
        self._prompt: list[int] = []
        self._tokens = list(first)
        self._text = b""
        self._ends: list[int] = []  # bytes of the text after each token
        self._n_told = self._n_given = 0  # tokens and bytes of a stream
        self._n_silent = 0  # tokens since the last piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self.cut: int | None = None

    def __call__(self, tokens: Any, logits: Any) -> bool:
        if self.early or self.cut is not None:
            return not self.streamed  # what is streamed was given
        return self._was_told or (len(tokens) > 0 and self._stops(tokens, logits))

    def _stops(self, tokens: Any, logits: Any) -> bool:
        self._was_told = self.stops is not None and bool(self.stops(tokens, logits))
        return self._was_told

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> Ending | None:
        """That of the completion which calls `generate`, if one does; only criteria of the user stay."""
        ending = kwargs.get("stopping_criteria")
        if not isinstance(ending, cls):
            return None
        kwargs["stopping_criteria"] = None if ending.stops is None else ending._stops
        return ending

    def begin(self, prompt: list[int]) -> None:
        self._prompt = prompt

    def see(self, token: int) -> None:
        """A token was drawn."""
        if not self._follows or self.cut is not None or self._llm.ends_text(token):
            return
        self._tokens.append(token)
        before, self._text = self._text, self._llm.detokenize(self._tokens, prev_tokens=self._prompt)
        same = len(before)
        if not self._text.startswith(before):  # a tokenizer that had U+FFFD for half a character
            pairs = zip(before, self._text, strict=False)
            same = next((i for i, (old, new) in enumerate(pairs) if old != new), len(self._text))
            self._ends = [min(end, same) for end in self._ends]
        self._ends.append(len(self._text))
        found = [self._text.find(s, max(same - len(s) + 1, 0)) for s in self._strings]
        self.cut = min((i for i in found if i >= 0), default=None)

    def must_end(self, n_drawn: int, n_free: int) -> bool:
        """Whether the last token was the last one, with so many drawn and room for so many more in the context."""
        if self.cut is not None:
            return True
        self.early = n_free < 1 or (self.most is not None and n_drawn >= self.most + LONGEST_REST)
        return self.early

    def _n_behind(self) -> int:
        """Tokens, the last ones, that a stop string leaves nothing of."""
        begins = [0, *self._ends[:-1]]
        return 0 if self.cut is None else sum(begin >= self.cut for begin in begins[: len(self._ends)])

    def whole(self, answer: dict[str, Any], said: str, has_text: Callable[[int], bool]) -> dict[str, Any]:
        """An answer of llama-cpp-python's, not streamed, as it was asked for.

        Args:
            said: text that comes before it.
            has_text: which tokens log probabilities are told of.
        """
        choice = answer["choices"][0]
        if self.early:
            choice["finish_reason"] = "length"
        if self.cut is not None:
            choice["text"], choice["finish_reason"] = self._text[: self.cut].decode("utf-8", "ignore"), "stop"
        choice["text"] = said + choice["text"]
        if self.record is not None:
            self.record.drop(self._n_behind())
            choice["logprobs"] = self.record.all(has_text)
        return answer

    def _ready(self, last: bool) -> Iterator[tuple[str, int]]:
        """What can be told of the text now and was not, token by token: none that a stop string may begin in.

        Yields:
            A piece, and how many tokens have come since the one before.
        """
        end = len(self._text) if self.cut is None else self.cut
        is_all = last or self.cut is not None
        if not is_all:
            new = self._text[self._n_given :]  # what was told holds no beginning of a stop string
            end -= max((_begun(new, s) for s in (*self._strings, HALF * 2)), default=0)
        while self._n_told < len(self._ends) and (is_all or self._ends[self._n_told] <= end):
            to = max(min(self._ends[self._n_told], end), self._n_given)
            piece = self._decoder.decode(self._text[self._n_given : to])
            self._n_given, self._n_told = to, self._n_told + 1
            self._n_silent += 1
            if piece:
                yield piece, self._n_silent
                self._n_silent = 0

    def pieces(self, chunks: Iterator[dict[str, Any]], said: str) -> Iterator[dict[str, Any]]:
        """The chunks of llama-cpp-python's stream, with this text in place of theirs.

        Args:
            said: text that comes before it.
        """
        with contextlib.closing(chunks):  # type: ignore[type-var]
            for chunk in chunks:
                choice = chunk["choices"][0]
                last, reason = choice["finish_reason"] is not None, choice["finish_reason"]
                if said:
                    yield {
                        **chunk,
                        "choices": [{**choice, "text": said, "logprobs": None, "finish_reason": None}],
                    }
                    said = ""
                for piece, n in self._ready(last):
                    told = self.record.of(n) if self.record is not None else None
                    one = {**choice, "text": piece, "logprobs": told, "finish_reason": None}
                    yield {**chunk, "choices": [one]}
                if last:
                    reason = "stop" if self.cut is not None else reason
                    rest = self._n_silent - self._n_behind()  # of half a character
                    told = self.record.of(rest) if self.record is not None and rest > 0 else None
                    yield {
                        **chunk,
                        "choices": [{**choice, "text": "", "logprobs": told, "finish_reason": reason}],
                    }


def _begun(text: bytes, stop: bytes) -> int:
    """Bytes at the end of a text that a stop string begins with; all of it would have ended the text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
