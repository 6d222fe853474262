"""Clients of a server under load: who asks when, for how much, and what they saw."""

from __future__ import annotations

import http.client
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ..measure.child import ChildServer, RequestFailed
from ..measure.foreign import SAMPLING
from ..measure.turns import Prompt

SHARES = (50, 95, 99)  # percentiles


class Load(NamedTuple):
    """How requests come: from so many clients, each of whom asks again when it is answered, or by themselves, so many a
    second on average."""

    clients: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} request{'s' if self.rate != 1 else ''}/s"
        return f"{self.clients} clients" if self.clients != 1 else "1 client"


class Seen(NamedTuple):
    """A request as its client saw it. Seconds are those of `time.perf_counter`."""

    asked: float  # when it was due
    times: list[float]  # when pieces of text came, mostly of one token
    text: str
    n_tokens: int
    error: str | None = None


def arrivals(n: int, rate: float, seed: int) -> np.ndarray[Any, Any]:
    """When the requests of a Poisson process come, seconds after its start. [n]"""
    return np.cumsum(np.random.default_rng(seed).exponential(1.0 / rate, n))


def lengths(n: int, longest: int, seed: int) -> list[int]:
    """Tokens that users want at most: log-normal, as lengths in shared conversations are, most of them short and a long
    tail, with a median of a third of `longest` and nothing beyond it. [n]"""
    drawn = np.random.default_rng(seed).lognormal(np.log(longest / 3.0), 1.0, n)
    return [int(x) for x in np.clip(np.round(drawn), min(4, longest), longest)]


def ask(server: ChildServer, prompt: Prompt, due: float | None = None) -> Seen:
    """Ask for one answer, streamed, and read it to its end."""
    body = {
        "model": "model", "prompt": list(prompt.tokens), "max_tokens": prompt.n_tokens, "temperature": prompt.temp,
        "seed": prompt.seed, "stream": True, "stream_options": {"include_usage": True}, **SAMPLING,
    }  # fmt: skip
    asked = time.perf_counter() if due is None else due
    times: list[float] = []
    pieces: list[str] = []
    n_tokens = 0
    try:
        for came, event in server.stream("/v1/completions", body):
            n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
            if text := "".join(choice.get("text") or "" for choice in event.get("choices", ())):
                times.append(came)
                pieces.append(text)
    except (RequestFailed, OSError, http.client.HTTPException, ValueError) as e:
        return Seen(asked, times, "".join(pieces), n_tokens, f"{type(e).__name__}: {e}")
    return Seen(asked, times, "".join(pieces), n_tokens)


def under(
    load: Load, asking: Callable[[Prompt, float | None], Seen], prompts: Sequence[Prompt], seed: int
) -> list[Seen]:
    """All prompts, asked as the load says; in their order."""
    if load.rate is not None:
        start = time.perf_counter()

        def at(prompt: Prompt, when: float) -> Seen:
            # from when it was due: a client that is late itself must not make a server look faster
            time.sleep(max(start + when - time.perf_counter(), 0.0))
            return asking(prompt, start + when)

        due = arrivals(len(prompts), load.rate, seed)
        with ThreadPoolExecutor(len(prompts)) as users:
            return list(users.map(at, prompts, due))

    seen: dict[int, Seen] = {}
    following = itertools.count()
    lock = threading.Lock()

    def user(_: int) -> None:
        while True:
            with lock:
                i = next(following)
            if i >= len(prompts):
                return
            seen[i] = asking(prompts[i], None)

    assert load.clients is not None
    with ThreadPoolExecutor(load.clients) as users:
        list(users.map(user, range(load.clients)))
    return [seen[i] for i in range(len(prompts))]


def throughput(seen: Sequence[Seen]) -> float:
    """Tokens per second, from the first request to the last piece of an answer; failed ones count in the time alone."""
    ends = [s.times[-1] for s in seen if s.times]
    seconds = max(ends) - min(s.asked for s in seen) if ends else 0.0
    return sum(s.n_tokens for s in seen if s.error is None) / seconds if seconds > 0 else 0.0


def figures(rounds: Sequence[Sequence[Seen]]) -> dict[str, Any]:
    """Of all rounds: throughput by its median, times over all requests that were answered; None where there are none.

    Gaps are between pieces of text: drafts that were right come together, and the next ones later.
    """
    answered = [s for seen in rounds for s in seen if s.error is None]
    gaps = [1e3 * gap for s in answered for gap in np.diff(s.times)]
    first = [1e3 * (s.times[0] - s.asked) for s in answered if s.times]
    return {
        "tokens_per_second": float(np.median([throughput(seen) for seen in rounds])),
        "first_ms": _percentiles(first),
        "gap_ms": _percentiles(gaps),
        "requests": sum(len(seen) for seen in rounds),
        "errors": sum(s.error is not None for seen in rounds for s in seen),
        "error": next((s.error for seen in rounds for s in seen if s.error is not None), None),
    }


def _percentiles(values: Sequence[float]) -> list[float] | None:
    return [round(float(x), 3) for x in np.percentile(values, SHARES)] if values else None
