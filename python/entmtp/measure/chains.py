"""Drafts of a fixed length after a match of a fixed length, as of llama.cpp's ngram-simple, over recorded texts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..bank import Costs, Traces
from ..native.stats import STEP_DTYPE
from .replay import Replay


def chains(traces: Traces, costs: Costs, match: int, draft: int) -> Replay:
    """Up to `draft` tokens of what followed where the last `match` tokens came last, in every step; drafting is free.

    Raises:
        ValueError: the traces hold no texts.
    """
    if traces.texts is None:
        raise ValueError("these traces hold no texts to draft from: record them again")
    curve = costs.curve()
    steps = list(_steps(traces, match, draft))
    records = np.zeros(len(steps), dtype=STEP_DTYPE)
    for record, (n_nodes, n_accepted) in zip(records, steps, strict=True):
        record["n_nodes"], record["n_accepted"] = n_nodes, n_accepted
        record["t_verify_us"] = round(curve[n_nodes - 1])
    return Replay(records, int(len(steps) + records["n_accepted"].sum()), costs)


def _steps(traces: Traces, match: int, draft: int) -> Iterator[tuple[int, int]]:
    """Tokens in the pass and drafts accepted, step by step."""
    assert traces.texts is not None
    begin = 0
    for n_prompt, n_tokens in zip(traces.texts.n_prompt, traces.n_tokens, strict=True):
        text = traces.texts.tokens[begin : begin + n_prompt + n_tokens].tolist()
        begin += n_prompt + n_tokens
        last: dict[tuple[int, ...], int] = {}  # a run of tokens: what comes after its latest place
        known = match
        at, end = int(n_prompt), len(text) - 1  # the last token is drawn, not evaluated
        while at < end:
            for i in range(known, at + 1):
                last[tuple(text[i - match : i])] = i
            known = max(known, at + 1)
            place = last.get(tuple(text[at + 1 - match : at + 1]), at + 1)
            guesses = text[place : min(place + draft, at + 1)]
            came = text[at + 1 : end]
            right = next((i for i, (a, b) in enumerate(zip(guesses, came, strict=False)) if a != b), None)
            n_right = min(len(guesses), len(came)) if right is None else right
            yield 1 + len(guesses), n_right
            at += 1 + n_right
