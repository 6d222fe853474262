"""Answers of several methods to the same prompts, in turn in one process: the machine's drift hits them all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from ..native import kernels as cpu_kernels
from ..native.stats import DraftStats
from .methods import Method

Advance = Callable[[str, int, int], None]  # stage, done, total


class Prompt(NamedTuple):
    """What is asked: tokens of a prompt, how many to answer at most, and how they are drawn."""

    tokens: Sequence[int]
    n_tokens: int
    temp: float = 0.0
    seed: int = 1234


class Answer(NamedTuple):
    """Tokens, seconds from the first of them to the last, what drafting did in that time, where that is kept, when
    each token came: seconds after the first [n_tokens], and in how many passes, where no more is known."""

    tokens: list[int]
    seconds: float
    stats: DraftStats | None = None
    times: list[float] = []  # noqa: RUF012 (never changed)
    n_passes: int | None = None


Answering = Callable[[Prompt], Answer]


def decode(llm: Any, prompt: Prompt, *, untimed: int = 1, past_end: bool = False, **sampling: Any) -> Answer:
    """Generate from a fresh start.

    Args:
        llm: an `entmtp.Llama`, or a `llama_cpp.Llama`, which keeps no statistics.
        untimed: the clock and the statistics start with this token.
        past_end: go on after an end-of-text token.
        sampling: further settings of `Llama.generate`.
    """
    llm.reset()
    llm.set_seed(prompt.seed)
    ours = hasattr(llm, "draft_stats")
    tokens: list[int] = []
    times: list[float] = []
    start = 0.0
    for token in llm.generate(prompt.tokens, temp=prompt.temp, **sampling):
        tokens.append(token)
        times.append(time.perf_counter())
        if len(tokens) == untimed:
            if ours:
                llm.reset_draft_stats()
            start = times[-1] = time.perf_counter()
        if len(tokens) == prompt.n_tokens or (token == llm.token_eos() and not past_end):
            break
    seconds = times[-1] - start if start else 0.0
    return Answer(tokens, seconds, llm.draft_stats if ours else None, [max(t - start, 0.0) for t in times])


def answering(llm: Any, method: Method | None = None, kernels: str | None = None) -> Answering:
    """How a model answers in turn: eight tokens first, to build graphs and to wake threads, then the answer.

    Args:
        method: set before every answer, where several share the model; without, only the first needs the eight tokens.
        kernels: CPU kernels that it was loaded with, where models in turn have different ones.
    """
    warm = False

    def answer(prompt: Prompt) -> Answer:
        nonlocal warm
        with cpu_kernels.using(kernels) if kernels else nullcontext():
            if method:
                method.apply(llm)
            if method or not warm:
                decode(llm, prompt._replace(n_tokens=8))
                warm = True
            return decode(llm, prompt)

    return answer


def in_turn(
    methods: dict[str, Answering], prompts: Sequence[Prompt], n_rounds: int = 1, advance: Advance | None = None
) -> list[dict[str, Answer]]:  # fmt: skip
    """Every method answers every prompt, `n_rounds` times, each time another one first: answers by method, for each
    prompt of each round."""
    labels = list(methods)
    turns: list[dict[str, Answer]] = []
    for k, i in [(k, i) for k in range(n_rounds) for i in range(len(prompts))]:
        answers = {}
        for j in range(len(labels)):
            label = labels[(i + j + k) % len(labels)]
            answers[label] = methods[label](prompts[i])
            if advance:
                advance("answers", len(turns) * len(labels) + j + 1, n_rounds * len(prompts) * len(labels))
        turns.append(answers)
    return turns
