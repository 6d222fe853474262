"""`entmtp bench mislead`: what drafting costs where it cannot bring anything.

Texts made to mislead: random tokens in which runs of tokens come again and again and go on differently each time.
Nobody would write them, so they are given to the model token by token, each after a draw as in decoding. And heads that
are sure of wrong tokens, on ordinary prompts.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from ..bank import PLAIN as PLAIN_TREE
from ..bank import Bank
from ..bank.traces import join
from ..common.progress import stages
from ..measure.compare import Comparison, remark
from ..measure.replay import replay_auto
from ..measure.rollouts import forced, rollout
from ..measure.turns import Answer, Answering, Prompt, answering, in_turn
from ..options import load
from ..report.tables import Form, table
from .inputs import changed, load_plain, model_of
from .questions import read_tasks, tokens_of
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
    """Goes through the tokens of a prompt as if they had been drawn; the first START are there before."""

    def answer(prompt: Prompt) -> Answer:
        llm.reset()
        llm.set_seed(prompt.seed)
        times: list[float] = []
        given = prompt.tokens[START : START + prompt.n_tokens]
        for _ in forced(llm, prompt.tokens[:START], given, temp=prompt.temp):
            times.append(time.perf_counter())
            if len(times) == 1:
                llm.reset_draft_stats()
        return Answer(list(given), times[-1] - times[0], llm.draft_stats, [t - times[0] for t in times])

    return answer


def counted(ours: Any, recording: Any, prompts: Sequence[Prompt]) -> float:
    """Speed against plain decoding by replay: passes and drafts that are counted, at the costs of the bank. A model
    that drafts is left out: no replay can ask it."""
    done = []
    who = [name for name in ours.drafters if name != "model"]
    for p in prompts:
        recording.set_seed(p.seed)
        given = p.tokens[START : START + p.n_tokens]
        done.append(
            rollout(recording, p.tokens[:START], len(given), ranks_too=False, given=given, temp=p.temp)
        )
    texts, heads = join(done), ours.draft_heads if ours.heads_path else None
    plain = replay_auto(texts, ours.bank, drafters=())
    return plain.us / replay_auto(texts, ours.bank, heads, drafters=who).us


def rows_of(turns: list[dict[str, Answer]]) -> list[dict[str, Any]]:
    found = Comparison(turns)
    return [found.row(label, PLAIN) for label in turns[0]]


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """Speed against plain decoding: all tokens over all time, and by text."""
    columns: dict[str, Form] = {
        "method": "{method}", "against plain, overall": "{overall:.2f}", "median (quartiles)": "{ratio:.2f}",
        "tokens/step": "{tokens_per_step:.2f}",
    }  # fmt: skip
    return f"### {title}\n\n{table(columns, rows)}{remark(rows[:1])}"


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

        recording = stack.enter_context(closing(load(args, policy="off")))
        recording.set_trees(Bank("off", (PLAIN_TREE,)), policy="off")

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
                methods = {label: forcing(llm) for label, llm in ours.items()}
                text = measured(f"made to mislead, {kind}, temperature {temp:g}", methods, asked)
                costs = {
                    label: counted(llm, recording, asked) for label, llm in ours.items() if label != PLAIN
                }
                report["mislead"][-1]["counted"] = costs
                text += "By counted cost, from the first token of the first text on: "
                yield text + ", ".join(f"{label} {x:.3f}" for label, x in costs.items()) + "\n"
            if args.heads and (args.suite or args.prompts):
                tasks = read_tasks(args)
                asked = [
                    Prompt(tokens_of(plain, q, args), args.tokens, temp)
                    for task in tasks
                    for q in tasks[task]
                ]
                live = {label: answering(ours[label]) for label in (PLAIN, USELESS)}
                yield measured(f"useless heads alone, {', '.join(tasks)}, temperature {temp:g}", live, asked)
