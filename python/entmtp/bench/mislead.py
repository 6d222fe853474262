"""`entmtp bench mislead`: what drafting costs where it cannot bring anything.

Texts made to mislead: random tokens in which runs of tokens come again and again and go on differently each time.
Nobody would write them, so they are given to the model token by token, each after a draw as in decoding. And heads that
are sure of wrong tokens, on ordinary prompts.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from ..common.progress import stages
from ..measure.compare import Comparison, remark
from ..measure.turns import Answer, Answering, Prompt, answering, in_turn
from ..options import load
from ..report.tables import figure, spread, table
from .inputs import changed, load_plain, model_of, read_tasks, tokens_of
from .study import make_useless

PLAIN, ENTMTP, USELESS = "plain", "EntMTP", "EntMTP, useless heads"
START = 32  # tokens of a text that are its prompt
RUNS = {"runs of 2 tokens": (2, 2), "runs of 2 to 8 tokens": (2, 8)}  # shortest and longest


def misleading(n_vocab: int, n_tokens: int, shortest: int, longest: int, seed: int) -> list[int]:
    """Tokens in which each of a dozen runs comes every few dozen tokens, and goes on with random ones.

    A text drafter sees a match at the end of every run, and what followed there last time is wrong. Within a run longer
    than two tokens it is right.
    """
    rng = np.random.default_rng(seed)
    runs = [rng.integers(0, n_vocab, rng.integers(shortest, longest + 1)) for _ in range(12)]
    text: list[int] = []
    while len(text) < n_tokens:
        text += runs[rng.integers(len(runs))].tolist()
        text += rng.integers(0, n_vocab, rng.integers(1, 4)).tolist()
    return text[:n_tokens]


def forcing(llm: Any) -> Answering:
    """Goes through the tokens of a prompt one by one, as if they had been drawn; the first START are there before."""

    def answer(prompt: Prompt) -> Answer:
        first, rest = list(prompt.tokens[:START]), prompt.tokens[START : START + prompt.n_tokens]
        llm.reset()
        llm.set_seed(prompt.seed)
        llm.eval(first)
        llm.sample(temp=prompt.temp)
        llm.eval(rest[:1])  # the clock starts with the second, as in `decode`
        llm.reset_draft_stats()
        times, start = [0.0], time.perf_counter()
        for token in rest[1:]:
            llm.sample(temp=prompt.temp)
            llm.eval([token])
            times.append(time.perf_counter() - start)
        return Answer(list(rest), times[-1], llm.draft_stats, times)

    return answer


def rows_of(turns: list[dict[str, Answer]]) -> list[dict[str, Any]]:
    found = Comparison(turns)
    return [found.row(label, PLAIN) for label in turns[0]]


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """Speed against plain decoding: all tokens over all time, and by text."""
    cells = [
        [r["method"], figure(r["overall"]), spread(r["ratio"]), figure(r.get("tokens_per_step", 1.0))]
        for r in rows
    ]
    head = ["method", "against plain, overall", "median (quartiles)", "tokens/step"]
    return f"### {title}\n\n{table(head, cells)}{remark(rows[0]['pairs'], rows[0]['answers'])}"


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    report["mislead"] = []
    with ExitStack() as stack:
        args = stack.enter_context(model_of(args, args.model, needs_heads=False))
        plain = stack.enter_context(closing(load_plain(args)))
        report["threads"] = plain.n_threads
        ours = {PLAIN: plain, ENTMTP: stack.enter_context(closing(load(args)))}
        if args.heads:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="entmtp-useless-"))
            wrong = changed(args, heads=str(make_useless(args.heads, Path(folder) / "useless.gguf")))
            ours[USELESS] = stack.enter_context(closing(load(wrong, drafters=["heads"])))

        def measured(title: str, methods: dict[str, Answering], prompts: list[Prompt]) -> str:
            with stages() as advance:
                rows = rows_of(in_turn(methods, prompts, args.rounds, advance))
            report["mislead"].append({"text": title, "rows": rows})
            return markdown(title, rows)

        for temp in args.temp:
            for kind, (shortest, longest) in RUNS.items():
                texts = [
                    misleading(plain.n_vocab(), START + args.tokens, shortest, longest, seed)
                    for seed in range(args.limit)
                ]
                asked = [Prompt(text, args.tokens, temp) for text in texts]
                forced = {label: forcing(llm) for label, llm in ours.items()}
                yield measured(f"made to mislead, {kind}, temperature {temp:g}", forced, asked)
            if args.heads and (args.suite or args.prompts):
                tasks = read_tasks(args)
                asked = [
                    Prompt(tokens_of(plain, q, args), args.tokens, temp)
                    for task in tasks
                    for q in tasks[task]
                ]
                live = {label: answering(ours[label]) for label in (PLAIN, USELESS)}
                yield measured(f"useless heads alone, {', '.join(tasks)}, temperature {temp:g}", live, asked)
