"""`entmtp bench run`: llama-cpp-python, our plain loop, static trees and EntMTP side by side, in one process."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import llama_cpp

from ..common.errors import UsageError
from ..common.machine import peak_memory_mb
from ..common.progress import stages
from ..llama import Llama
from ..measure.compare import Comparison, remark
from ..measure.methods import CONFIDENCE, ENTMTP, PLAIN_LOOP, Method, comparison, generic, published
from ..measure.turns import Answering, Prompt, answering, in_turn
from ..native import kernels
from ..options import load
from ..report.tables import figure, spread, table
from .inputs import load_plain, model_of, read_tasks, tokens_of

STOCK = "llama-cpp-python"
GGML = Method("EntMTP, ggml's kernels", None, "entropy")  # as ENTMTP, but for the CPU kernels


def contestants(args: Namespace, stack: ExitStack) -> tuple[Llama, dict[str, Answering]]:
    """Our plain loop, and every method by label; their models are closed with the stack."""

    def loaded(**more: Any) -> Llama:
        return stack.enter_context(closing(load(args, **more)))

    found: dict[str, Answering] = {}
    plain = stack.enter_context(closing(load_plain(args, stats=False)))
    own = kernels.current()
    if not args.rpc:  # llama-cpp-python would need servers of its own
        with kernels.using("off"):
            stock = llama_cpp.Llama(
                plain.model_path, n_ctx=plain.n_ctx(), n_threads=plain.n_threads, n_threads_batch=plain.n_threads_batch,
                n_gpu_layers=args.n_gpu_layers or 0, tensor_split=args.tensor_split, flash_attn=bool(args.flash_attn),
                verbose=False,
            )  # fmt: skip
        found[STOCK] = answering(stack.enter_context(closing(stock)), kernels="off")
        found[GGML.label] = answering(loaded(kernels="off"), kernels="off")
    found[PLAIN_LOOP.label] = answering(plain, kernels=own)
    draft = loaded(policy="off")
    usual = [*published()[: args.published], *generic(draft.draft_heads.arch), ENTMTP, CONFIDENCE]
    known = {m.label: m for m in [*usual, *published(), *comparison()]}
    if missing := [m for m in args.methods or () if m not in known]:
        raise UsageError(f"there is no method {missing[0]}; there are {', '.join(known)}")
    for method in [known[name] for name in args.methods] if args.methods else usual:
        if method in (ENTMTP, CONFIDENCE):  # models of their own: they learn from answer to answer
            found[method.label] = answering(loaded(policy=method.policy), kernels=own)
        else:
            found[method.label] = answering(draft, method, own)
    return plain, found


def judged(found: Comparison, labels: list[str]) -> list[dict[str, Any]]:
    """A row per method: speed against the first one and against our plain loop."""
    rows = []
    for label in labels:
        row = found.row(label, labels[0]) | {"ratio_plain": found.ratio(label, PLAIN_LOOP.label)}
        # kernels differ in rounding: texts are compared with those of a loop that has the same
        loop = STOCK if label == GGML.label else PLAIN_LOOP.label
        rows.append(row | {"identical": found.identical(label, loop)})
    return rows


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """A task's rows as a Markdown table."""
    bases = {rows[0]["method"]: "ratio", PLAIN_LOOP.label: "ratio_plain"}  # over RPC both are the plain loop
    head = [
        "method", "tokens/s", "overall", *(f"against {base}" for base in bases), "tokens/step", "draft", "verify",
        "sample", "host", "rest", "identical",
    ]  # fmt: skip
    cells = [[
        r["method"], spread(r["tokens_per_second"], "{:.1f}"), figure(r["tokens_per_second_overall"], "{:.1f}"),
        *(spread(r[key], unit="×") for key in bases.values()), figure(r.get("tokens_per_step", 1.0)),
        *(f"{x:.0%}" for x in r.get("time_split", {}).values()), *([] if "time_split" in r else [""] * 5),
        f"{r['identical']}/{r['answers']}",
    ] for r in rows]  # fmt: skip
    return f"### {title}\n\n{table(head, cells)}{remark(rows[0]['pairs'], rows[0]['answers'])}"


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    tasks = read_tasks(args)
    report["tasks"] = []
    with ExitStack() as stack:
        args = stack.enter_context(model_of(args, args.model))
        plain, methods = contestants(args, stack)
        report["threads"] = plain.n_threads
        for task, temp in [(task, temp) for task in tasks for temp in args.temp]:
            prompts = [Prompt(tokens_of(plain, q, args), args.tokens, temp) for q in tasks[task]]
            with stages() as advance:
                rows = judged(Comparison(in_turn(methods, prompts, args.rounds, advance)), list(methods))
            report["tasks"].append({"task": task, "temp": temp, "rows": rows})
            yield markdown(f"{task}, temperature {temp:g}", rows)
    if (peak := peak_memory_mb()) is not None:
        report["peak_memory_mb"] = peak
        yield f"Peak memory of the process, with all instances of the model: {peak:.0f} MB\n"
