"""Where the tokens of a streamed answer came from, for clients that ask for it (docs/serve.md).

A chunk of text may hold several tokens, or come after tokens that ended within a character's bytes: tokens wait here
until their text is sent.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..llama import Llama
from ..measure.speed import Meter, PlainPass
from ..native.abi import SOURCES
from ..native.group import Passes

REFRESH = 0.2  # seconds between two looks at the speed


@dataclass
class _Drawn:
    """A token whose text was not sent yet."""

    piece: bytes
    facts: dict[str, Any]


@dataclass
class Details:
    """Follows the answers of one request.

    Args:
        passes: of all answers under way, where they share passes.
    """

    passes: Callable[[], Passes] | None
    _waiting: deque[_Drawn] = field(default_factory=deque)
    _steps: list[dict[str, Any]] = field(default_factory=list)  # that were not sent yet
    _texts: dict[int, str] = field(default_factory=dict)  # of tokens in trees
    _speed: dict[str, Any] | None = None  # at the end of the answer

    # -- for the model --

    @contextmanager
    def follow(self, llama: Llama, plain: PlainPass) -> Iterator[None]:
        """While `llama` draws the tokens of an answer; `plain` is what a pass over one token takes there."""
        self._waiting.clear()
        self._steps.clear()
        self._speed = None
        self._llama, self._plain = llama, plain
        self._n_steps, self._root, self._at = 0, -1, 0
        self._meter = Meter(llama, plain)
        self._looked = self._meter.begin
        self._n_parts = 0  # of passes, before the first token
        llama.on_token = self._token
        try:
            yield
        finally:
            llama.on_token = None
            self._speed = self._look()

    def _token(self, token: int, drafters: int) -> None:
        if not self._meter.n_tokens and self.passes:
            self._n_parts = self.passes().parts
        self._meter.token()
        decoder, walk = self._llama.decoder, self._llama.decoder.walk()
        entropy, log_p = decoder.signals(token)
        nodes = walk.nodes
        if len(nodes) and walk.n_past != self._root:
            self._root, self._at = walk.n_past, 0
            self._n_steps += 1
            self._steps.append({
                "step": self._n_steps,
                "texts": [self._text(int(t)) for t in nodes["token"]],
                "parents": nodes["parent"].tolist(),
                "sources": [_names(int(s)) for s in nodes["sources"]],
            })  # fmt: skip
        children = (nodes["parent"] == self._at) & (nodes["token"] == token)
        node = int(children.argmax()) if children.any() else None
        facts = {
            "source": _names(int(nodes["sources"][node])) if node is not None else [],
            "p": round(math.exp(log_p), 4), "entropy": round(entropy, 4), "running": round(walk.entropy, 4),
            "step": self._n_steps or None, "node": node,
        }  # fmt: skip
        self._at = len(nodes) if node is None else node
        piece = self._llama.detokenize([token])
        if not piece:  # a control token, such as the end of the answer
            facts["piece"] = self._text(token)
        self._waiting.append(_Drawn(piece, facts))

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._llama.detokenize([token], special=True).decode("utf-8", "replace")
        return self._texts[token]

    def _look(self) -> dict[str, Any]:
        """The speed so far; in the thread that draws."""
        speed, plain = self._meter.speed(), self._plain
        stats = speed.stats
        # passes that others had a part in tell nothing of what this answer would have cost alone
        alone = self.passes is None or self.passes().parts - self._n_parts == stats.n_steps
        us, seen_in = plain.during(stats), plain.seen_in(stats)
        self._looked = time.perf_counter()
        return {
            "tokens": speed.n_tokens, "seconds": round(speed.seconds, 4),
            "tokens_per_second": round(speed.tokens_per_second, 2), "passes": stats.n_steps,
            "drafted": stats.n_drafted, "accepted": stats.n_accepted, "alone": alone,
            "plain_pass_us": round(us, 1) if us is not None and alone else None,
            "plain_pass_from": seen_in if alone else None,
            "against_plain": round(speed.speedup, 3) if speed.speedup is not None and alone else None,
        }  # fmt: skip

    # -- for the answer --

    def add_to(self, chunk: dict[str, Any], is_prompt: bool = False) -> None:
        """Put the details of a chunk's text into the chunk; of the prompt's, which is told again, there are none."""
        choice = chunk["choices"][0]
        if is_prompt:
            chunk["entmtp"] = {"tokens": [], "steps": []}
            return
        said = choice.get("delta") or {"content": choice.get("text")}
        text = (said.get("reasoning_content") or "") + (said.get("content") or "")
        tokens = self._of(text)
        if choice["finish_reason"] is not None:  # what has no text: the end, or what a stop sequence cut
            tokens += [{"text": "", **drawn.facts} for drawn in self._waiting]
            self._waiting.clear()
        chunk["entmtp"] = {"tokens": tokens, "steps": self._steps}
        self._steps = []
        if self._speed is not None:
            chunk["entmtp"]["speed"] = self._speed
        elif self._meter.n_tokens > 1 and time.perf_counter() - self._looked > REFRESH:
            chunk["entmtp"]["speed"] = self._look()

    def _of(self, text: str) -> list[dict[str, Any]]:
        """The tokens of a text; a character belongs to the token that begins it."""
        data = text.encode()
        begins = [i for i, byte in enumerate(data) if byte & 0xC0 != 0x80] + [len(data)]
        # bytes that form no character are not in the text
        first = max(b"".join(drawn.piece for drawn in self._waiting).find(data), 0)
        tokens, at = list[dict[str, Any]](), -first
        while self._waiting and at < len(data):
            drawn = self._waiting.popleft()
            ends = (max(at, 0), max(at + len(drawn.piece), 0))
            lo, hi = (begins[min(bisect_left(begins, end), len(begins) - 1)] for end in ends)
            tokens.append({"text": data[lo:hi].decode(), **drawn.facts})
            at += len(drawn.piece)
        return tokens


def _names(sources: int) -> list[str]:
    return [name for name, bit in SOURCES.items() if sources & bit]
