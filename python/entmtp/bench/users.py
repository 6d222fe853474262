"""`entmtp bench users`: one model for several users at a time, with drafts and without; and a `Llama` for one."""

from __future__ import annotations

import itertools
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..common.progress import stages
from ..engine import Engine
from ..llama import Llama
from ..measure.methods import ENTMTP, PLAIN_LOOP
from ..measure.turns import Prompt
from ..native.group import Passes
from ..options import load, load_engine
from ..report.tables import Form, table
from .inputs import changed, model_of, undrafted
from .questions import read_tasks, tokens_of

ONE = "Llama, "  # and the method: an engine's counterpart for one user


class Told(NamedTuple):
    """An answer, and when its tokens came: seconds after it was asked for."""

    tokens: list[int]
    times: list[float]


class Alone:
    """A `Llama` where an engine is asked for: one user's."""

    passes = Passes(0, 0, 0)  # none are shared

    def __init__(self, llm: Llama):
        self.host, self.slots = llm, ()

    def slot(self) -> AbstractContextManager[Llama]:
        return nullcontext(self.host)


@contextmanager
def alone(args: Namespace) -> Iterator[Alone]:
    """A `Llama` with the attention of an engine, loaded in a thread that ends, as an engine's is."""
    args = changed(args, flash_attn=args.flash_attn is not False)
    with ThreadPoolExecutor(1) as loader:
        llm = loader.submit(load, args).result()
    with closing(llm):
        yield Alone(llm)


def serve(engine: Engine | Alone, prompts: list[Prompt], n_users: int) -> tuple[list[Told], float]:
    """All prompts answered by so many users, each of whom asks the next one when theirs is answered; seconds in all."""
    told: list[Told | None] = [None] * len(prompts)
    following = itertools.count()
    lock = threading.Lock()

    def user() -> None:
        while True:
            with lock:
                i = next(following)
            if i >= len(prompts):
                return
            prompt, tokens, times, asked = prompts[i], [], [], time.perf_counter()
            with engine.slot() as llm:
                llm.decoder.forget()  # the users are strangers, as to the server
                llm.reset()
                llm.set_seed(prompt.seed)
                for token in llm.generate(prompt.tokens, temp=prompt.temp):
                    tokens.append(token)
                    times.append(time.perf_counter() - asked)
                    if len(tokens) == prompt.n_tokens or token == llm.token_eos():
                        break
            told[i] = Told(tokens, times)

    for slot in engine.slots:
        slot.reset()
        slot.decoder.clear()  # or prompts of before need not be read again
    start = time.perf_counter()
    with ThreadPoolExecutor(n_users) as users:
        for one in [users.submit(user) for _ in range(n_users)]:
            one.result()
    return [t for t in told if t is not None], time.perf_counter() - start


def figures(answers: list[Told], seconds: float) -> dict[str, float]:
    """Of one round. Gaps are between tokens as users see them: drafts that were right come together."""
    gaps = 1e3 * np.concatenate([np.diff(t.times) for t in answers if len(t.times) > 1])
    return {
        "tokens_per_second": sum(len(t.tokens) for t in answers) / seconds,
        "gap_p50_ms": float(np.percentile(gaps, 50)),
        "gap_p99_ms": float(np.percentile(gaps, 99)),
        "first_token_p50_ms": 1e3 * float(np.median([t.times[0] for t in answers])),
    }


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    tasks = read_tasks(args)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    same: dict[tuple[str, int], int] = {}
    reference: list[list[int]] = []
    with model_of(args, args.model, needs_heads=False) as args, stages() as advance:
        plans = {PLAIN_LOOP.label: undrafted(args), ENTMTP.label: args}
        engines: dict[str, Callable[[], AbstractContextManager[Engine | Alone]]] = {}
        for label, plan in plans.items():
            engines[label] = partial(load_engine, plan, max(args.users))
        for label, plan in plans.items() if 1 in args.users else ():
            engines[ONE + label] = partial(alone, plan)
        todo = list(itertools.product(range(args.rounds), engines))
        for done, (_, label) in enumerate(todo):
            # one model at a time: two teams of threads on the same processors wait for each other
            with engines[label]() as engine:
                prompts = [
                    Prompt(tokens_of(engine.host, q, args), args.tokens, temp, seed=7)
                    for temp in args.temp for task in tasks.values() for q in task
                ]  # fmt: skip
                n_slots = max(len(engine.slots), 1)
                serve(engine, prompts[:n_slots], n_slots)  # builds graphs, wakes threads
                for n in (1,) if isinstance(engine, Alone) else args.users:
                    before = engine.passes
                    answers, seconds = serve(engine, prompts, n)
                    after = engine.passes
                    row = figures(answers, seconds)
                    row["texts_per_pass"] = (after.parts - before.parts) / max(after.n - before.n, 1)
                    found.setdefault((label, n), []).append(row)
                    texts = [a.tokens for a in answers]
                    reference = reference or texts  # plain decoding of one user
                    same[label, n] = same.get((label, n), 0) + sum(
                        a == b for a, b in zip(texts, reference, strict=True)
                    )
            advance("users", done + 1, len(todo))
    rows: list[dict[str, Any]] = []
    for (label, n), rounds in found.items():
        middle = {key: float(np.median([r[key] for r in rounds])) for key in rounds[0]}
        rows.append({"method": label, "users": n, "identical": same[label, n], **middle, "rounds": rounds})
    report["users"] = rows
    columns: dict[str, Form] = {
        "": "{method}", "users": "{users}", "tokens/s": "{tokens_per_second:.0f}",
        "of one plain user": lambda r: f"{r['tokens_per_second'] / rows[0]['tokens_per_second']:.2f}",
        "ms between tokens, p50": "{gap_p50_ms:.1f}", "p99": "{gap_p99_ms:.1f}",
        "ms to the first": "{first_token_p50_ms:.0f}", "texts a pass": lambda r: f"{r['texts_per_pass'] or 1:.2f}",
        "same text": f"{{identical}}/{len(prompts) * args.rounds}",
    }  # fmt: skip
    yield table(columns, rows)
