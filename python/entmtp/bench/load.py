"""`entmtp bench load`: numbers of threads beside busy programs, fixed ones and the one that follows the machine."""

from __future__ import annotations

import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from ..common.machine import fast_cores
from ..common.progress import stages
from ..measure.compare import Comparison
from ..measure.methods import ENTMTP, PLAIN_LOOP
from ..measure.stock import STOCK, stock
from ..measure.turns import Answering, Prompt, answering, in_turn
from ..native import kernels
from ..options import load
from ..report.tables import figure, table
from .inputs import changed, load_plain, model_of, read_tasks, turns_of

FOLLOWS = "as the machine is"


@contextmanager
def busy(n: int) -> Iterator[None]:
    """n programs that each keep a processor busy."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        time.sleep(0.5 if n else 0.0)
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def label_of(method: str, n_threads: int | None) -> str:
    return f"{method}, {FOLLOWS if n_threads is None else f'{n_threads} threads' if n_threads > 1 else '1 thread'}"


def contestants(args: Namespace, stack: ExitStack, counts: list[int]) -> tuple[Any, dict[str, Answering]]:
    """A plain loop that follows the machine, and every method with every number of threads."""
    found: dict[str, Answering] = {}
    args = changed(args, threads=None)
    plain = stack.enter_context(closing(load_plain(args, stats=False)))
    own = kernels.current()
    for n in counts:
        other = stack.enter_context(closing(stock(plain, n_threads=n, n_threads_batch=n)))
        found[label_of(STOCK, n)] = answering(other, kernels=kernels.OFF)
    found[label_of(PLAIN_LOOP.label, None)] = answering(plain, kernels=own)
    for n in counts:
        fixed = stack.enter_context(closing(load_plain(changed(args, threads=n), stats=False)))
        found[label_of(PLAIN_LOOP.label, n)] = answering(fixed, kernels=own)
    for number in (None, *counts):
        one = stack.enter_context(closing(load(changed(args, threads=number), policy="auto")))
        found[label_of(ENTMTP.label, number)] = answering(one, kernels=own)
    return plain, found


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    tasks = read_tasks(args)
    most = fast_cores()
    counts = args.counts or sorted({1, most})
    with ExitStack() as stack:
        args = stack.enter_context(model_of(args, args.model, needs_heads=False))
        plain, methods = contestants(args, stack, counts)
        prompts = [
            Prompt(t, args.tokens, temp)
            for temp in args.temp for task in tasks.values() for q in task for t in turns_of(plain, q, args)
        ]  # fmt: skip
        report["load"] = []
        for n in args.busy:
            with busy(n), stages() as advance:
                found = Comparison(in_turn(methods, prompts, args.rounds, advance))
            rows = [found.row(label, label_of(PLAIN_LOOP.label, None)) for label in methods]
            report["load"].append({"busy": n, "rows": rows})
    head = [
        "tokens/s beside",
        *(f"{n} busy programs" if n != 1 else "1 busy program" for n in args.busy),
        "same text",
    ]
    n_answers = len(prompts) * args.rounds * len(args.busy)
    cells = []
    for same_method in zip(*(beside["rows"] for beside in report["load"]), strict=True):
        label = same_method[0]["method"]
        same = f"{sum(row['identical'] for row in same_method)}/{n_answers}"
        speeds = [figure(row["tokens_per_second_overall"], "{:.0f}") for row in same_method]
        # llama-cpp-python's kernels round differently
        cells.append([label, *speeds, "" if label.startswith(STOCK) else same])
    yield table(head, cells)
