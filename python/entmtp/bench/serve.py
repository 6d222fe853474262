"""`entmtp bench serve`: servers under load, as users meet them: ours with drafts and without, and llama.cpp's own.

Every server is a process of its own, and there is never more than one: two would take each other's processors.
"""

from __future__ import annotations

import itertools
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from ..common.errors import UsageError
from ..common.machine import fast_cores
from ..common.progress import stages
from ..llama import Llama
from ..measure.baselines import SERVER, find
from ..measure.child import ChildServer
from ..measure.foreign import server_command
from ..measure.methods import ENTMTP, PLAIN_LOOP
from ..measure.turns import Prompt
from ..options.table import OPTIONS
from ..report.tables import Form, table
from .clients import Load, Seen, ask, figures, lengths, under
from .inputs import changed, load_plain, model_of, undrafted
from .questions import read_tasks, tokens_of

DRAFTS, PLAIN = f"{ENTMTP.label} serve", f"{PLAIN_LOOP.label} serve"
SERVERS = {"drafts": DRAFTS, "plain": PLAIN, SERVER: SERVER}


def command(label: str, port: int, args: Namespace, slots: int) -> list[str]:
    """How a server is started for so many answers at a time, each with `--ctx` tokens."""
    if label == SERVER:
        words = ["--model", args.model, "--threads", str(args.threads), "--threads-batch", str(args.threads)]
        return server_command(port, [*words, "--n-gpu-layers", str(args.n_gpu_layers or 0)], args.ctx, slots)
    args = args if label == DRAFTS else undrafted(args)
    words = []
    for option in OPTIONS:
        value = getattr(args, option.name)
        words += [f"{option.flag}={str(value).lower()}"] if isinstance(value, bool) else option.words(value)
    own = {
        "--host": "127.0.0.1", "--port": port, "--parallel": slots, "--stall": args.stall,
        "--n_threads_batch": args.threads,
    }  # fmt: skip
    own_words = (str(word) for option in own.items() for word in option)
    return [sys.executable, "-m", "entmtp.serve", *words, *own_words]


def requests_of(llm: Llama, args: Namespace) -> list[Prompt]:
    """What is asked: the questions of all tasks by turns, `--requests` of them, each for a drawn number of tokens."""
    asked = [[tokens_of(llm, question, args) for question in task] for task in read_tasks(args).values()]
    by_turns = [tokens for some in itertools.zip_longest(*asked) for tokens in some if tokens is not None]
    wanted = lengths(args.requests, args.tokens, seed=args.requests)
    return [
        Prompt(by_turns[i % len(by_turns)], n, args.temp[i % len(args.temp)], seed=i + 1)
        for i, n in enumerate(wanted)
    ]


def measure(
    label: str, load: Load, args: Namespace, prompts: Sequence[Prompt], slots: int, seed: int
) -> list[Seen]:
    """One load on a fresh server, which has answered something short in every slot before, and read no prompt yet."""
    warm = [prompts[0]._replace(tokens=prompts[0].tokens[:16], n_tokens=8)] * slots
    with closing(ChildServer(lambda port: command(label, port, args, slots))) as server:
        under(Load(clients=slots), lambda prompt, due: ask(server, prompt, due), warm, seed)
        return under(load, lambda prompt, due: ask(server, prompt, due), prompts, seed)


def same_texts(rounds: Sequence[Sequence[Seen]], reference: Sequence[Seen]) -> int:
    """Answers whose text is that of the reference."""
    return sum(
        a.error is None and b.error is None and a.text == b.text
        for seen in rounds for a, b in zip(seen, reference, strict=True)
    )  # fmt: skip


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    loads = [*(Load(clients=n) for n in args.clients), *(Load(rate=rate) for rate in args.rate)]
    if not loads or min((*args.clients, *args.rate, args.stall)) <= 0 or args.requests < 1 or args.rounds < 1:
        raise UsageError("give --clients, --rate, --requests, --rounds and --stall as numbers above 0")
    labels = [SERVERS[name] for name in args.servers]
    if SERVER in labels:
        find(SERVER)  # before minutes of measuring
    slots = args.slots or max(args.clients, default=4)
    found: dict[tuple[Load, str], list[list[Seen]]] = {
        (load, label): [] for load in loads for label in labels
    }
    with model_of(args, args.model, needs_heads=False) as args, stages() as advance:
        args = changed(args, threads=args.threads or fast_cores())
        with closing(load_plain(args, stats=False)) as llm:
            args = changed(args, ctx=llm.n_ctx())
            prompts = requests_of(llm, args)
        todo = list(itertools.product(range(args.rounds), loads, range(len(labels))))
        for done, (k, load, j) in enumerate(todo):
            label = labels[(j + k) % len(labels)]
            found[load, label].append(measure(label, load, args, prompts, slots, seed=k + 1))
            advance("servers under load", done + 1, len(todo))
    rows = []
    for (load, label), rounds in found.items():
        row = {"server": label, "load": str(load), **load._asdict(), **figures(rounds)}
        if PLAIN in labels:
            row["identical"] = same_texts(rounds, found[loads[0], PLAIN][0])
        rows.append(row)
    report |= {"serve": rows, "threads": args.threads, "slots": slots, "ctx": args.ctx, "model": args.model,
               "stall": args.stall}  # fmt: skip
    yield markdown(rows)
    for row in rows:
        if row["errors"]:
            yield f"{row['server']}, {row['load']}: {row['error']}\n"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each load and server."""
    columns: dict[str, Form] = {
        "load": "{load}", "server": "{server}", "tokens/s": "{tokens_per_second:.0f}",
        "ms to the first, p50": "{first_ms[0]:.0f}", "first, p95": "{first_ms[1]:.0f}",
        "ms between, p50": "{gap_ms[0]:.1f}", "p95": "{gap_ms[1]:.1f}", "p99": "{gap_ms[2]:.1f}",
        "errors": "{errors}", "same text": "{identical}/{requests}",
    }  # fmt: skip
    return table(columns, rows, n_text=2)
