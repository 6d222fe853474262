"""Log-probabilities of an answer's tokens in OpenAI's form, without the logits of the whole context.

llama-cpp-python reads them from the logits of every token that was ever evaluated (logits_all). Here a row is looked at
when its token is drawn, and what is kept of it is what the answer says.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import llama_cpp
import numpy as np
import numpy.typing as npt


class Vocabulary(Protocol):
    """What turns tokens into text."""

    def detokenize(self, tokens: Any) -> bytes: ...


@dataclass
class Scored:
    """A token and the most probable ones in its place, with ln p in float32; None: there was nothing before it."""

    token: int
    log_p: float | None = None
    best: list[tuple[int, float]] | None = None


def score(row: npt.NDArray[np.float32], token: int, n: int) -> Scored:
    """
    Args:
        row: logits [n_vocab] that the token was drawn from.
        n: how many of the most probable tokens are wanted; of equals those of the larger number, as in
            llama-cpp-python.
    """
    log_p = llama_cpp.Llama.logits_to_logprobs(row)
    n = min(n, len(log_p))
    best = np.flatnonzero(log_p >= np.partition(log_p, -n)[-n]) if n else np.zeros(0, np.intp)
    best = best[np.lexsort((best, log_p[best]))[::-1][:n]]
    return Scored(token, float(log_p[token]), [(int(i), float(log_p[i])) for i in best])


class Logprobs:
    """Follows one answer.

    Args:
        n: most probable tokens to tell beside each.
        echo: of the prompt's tokens, too.
        begin: characters before the first token's.
    """

    def __init__(self, llm: Vocabulary, n: int, echo: bool, begin: int):
        self.llm, self.n, self.echo = llm, n, echo
        self._waiting: deque[Scored] = deque()  # not told yet
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._at = 0 if echo else begin

    def read(self, prompt: Sequence[int], bos: int) -> None:
        """The prompt that will be evaluated from its beginning."""
        self._prompt = deque(prompt)
        if self.echo and prompt:
            first = self._prompt.popleft()
            if first != bos:
                self._waiting.append(Scored(first))

    def see(self, rows: npt.NDArray[np.float32]) -> None:
        """Logits [n, n_vocab] of tokens of the prompt, in their order."""
        for row in rows[: len(self._prompt)]:
            scored = score(row, self._prompt.popleft(), self.n)
            self._waiting.append(scored if self._waiting else Scored(scored.token))  # OpenAI's first has none

    def draw(self, row: npt.NDArray[np.float32], token: int) -> None:
        """A token was drawn from logits [n_vocab]."""
        self._waiting.append(score(row, token, self.n))

    def drop(self, n: int) -> None:
        """The tokens drawn last are no part of the text."""
        for _ in range(min(n, len(self._waiting))):
            self._waiting.pop()

    def all(self, has_text: Callable[[int], bool]) -> dict[str, Any]:
        """Of all tokens that were not told of and are part of the text."""
        return self._told([s for s in self._waiting if has_text(s.token)])

    def of(self, n: int) -> dict[str, Any]:
        """Of the next n tokens, those of a piece of the text."""
        return self._told([self._waiting.popleft() for _ in range(n)])

    def _told(self, scored: list[Scored]) -> dict[str, Any]:
        offsets = []
        for s in scored:
            offsets.append(self._at)
            self._at += len(self._decoder.decode(self.llm.detokenize([s.token])))
        return {
            "tokens": [self._text(s.token) for s in scored],
            "text_offset": offsets,
            "token_logprobs": [s.log_p for s in scored],
            "top_logprobs": [self._best(s) for s in scored],
        }

    def _best(self, s: Scored) -> dict[str, float | None] | None:
        if s.best is None:
            return None
        return {**{self._text(token): log_p for token, log_p in s.best}, self._text(s.token): s.log_p}

    def _text(self, token: int) -> str:
        return self.llm.detokenize([token]).decode("utf-8", "ignore")
