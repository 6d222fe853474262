"""`entmtp bench run`: llama-cpp-python, our plain loop, static trees and EntMTP side by side, in one process.

llama.cpp's own server and drafting (`make baselines`), where they are asked for, are processes of their own in the same
turns.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

from ..common.errors import UsageError
from ..common.machine import peak_memory_mb
from ..common.progress import stages
from ..llama import Llama
from ..measure.baselines import LABELS, Baseline, baseline
from ..measure.compare import Comparison, remark
from ..measure.foreign import Driver, Server, warmed
from ..measure.foretell import Foretelling, said
from ..measure.methods import ENTMTP, PLAIN_LOOP, Method, comparison, methods_of, published
from ..measure.rounding import Parting, parting
from ..measure.stock import LOOKUP, STOCK, stock
from ..measure.turns import Answering, Prompt, answering, in_turn
from ..native import kernels
from ..options import load
from ..report.tables import Form, Row, cell, table
from .inputs import load_plain, model_of
from .questions import prompts_of, read_tasks

GGML = Method("EntMTP, ggml's kernels", None, "auto")  # as ENTMTP, but for the CPU kernels


def contestants(args: Namespace, stack: ExitStack) -> tuple[Llama, dict[str, Answering], Foretelling | None]:
    """Our plain loop, every method by label, and what foretells EntMTP; their models are closed with the stack."""
    plain = stack.enter_context(closing(load_plain(args, stats=False)))
    own = kernels.current()

    def loaded(**more: Any) -> Llama:
        return stack.enter_context(closing(load(args, **more)))

    def of_stock(n_guesses: int) -> Answering:
        devices = {"n_gpu_layers": args.n_gpu_layers or 0, "tensor_split": args.tensor_split}
        other = stock(plain, n_guesses, flash_attn=bool(args.flash_attn), **devices)
        return answering(stack.enter_context(closing(other)), kernels="off")

    foretold: Foretelling | None = None

    def of_learning(method: Method) -> Answering:  # with a model of its own
        nonlocal foretold
        one = loaded(policy=method.policy, drafters=method.drafters)
        if method == ENTMTP and args.replay:
            foretold = Foretelling(one, draft)
        return answering(one, kernels=own)

    draft = loaded()
    arch = draft.draft_heads.arch if draft.heads_path else None
    fixed, learning = methods_of(arch, "model" in draft.drafters)
    makers: dict[str, Callable[[], Answering]] = {}
    if not args.rpc:  # llama-cpp-python would need servers of its own
        makers |= {label: partial(of_stock, n) for label, n in {STOCK: 0, **LOOKUP}.items()}
        makers[GGML.label] = lambda: answering(loaded(kernels="off"), kernels="off")
    usual = [m.label for m in fixed if m not in (*published()[args.published :], *comparison())]
    asked = args.methods or [*makers, *usual, *(m.label for m in learning)]
    makers[PLAIN_LOOP.label] = lambda: answering(plain, kernels=own)
    loops = [label for label in makers if label in asked or label not in LOOKUP]
    makers |= {m.label: partial(answering, draft, m, own) for m in fixed}
    makers |= {m.label: partial(of_learning, m) for m in learning}
    theirs = {label: other for label in asked if (other := baseline(label))}
    if missing := [m for m in asked if m not in makers and m not in theirs]:
        raise UsageError(
            f"there is no method {missing[0]}; there are {', '.join(makers)}, and, once built, {', '.join(LABELS)}"
        )
    found: dict[str, Answering] = {}
    for label in dict.fromkeys([*loops, *asked]):
        if label in makers:
            found[label] = makers[label]()
        else:
            with kernels.using(own):
                found[label] = warmed(stack.enter_context(closing(foreign(theirs[label], plain, args))))
    return plain, found, foretold


def foreign(method: Baseline, like: Llama, args: Namespace) -> Driver | Server:
    """A program of llama.cpp's with the model, the threads and the context of one of ours."""
    layers = args.n_gpu_layers or 0
    if method.server:
        return Server(method, like, args.draft_model, layers)
    return Driver(method, like, bool(args.flash_attn), args.draft_model, layers)


def judged(found: Comparison, labels: list[str]) -> list[dict[str, Any]]:
    """A row per method: speed against the first one and against our plain loop."""
    rows = []
    cut, bases = found.without_loops(), (labels[0], PLAIN_LOOP.label)
    for label in labels:
        first, plain = (found.row(label, base) for base in bases)
        # kernels differ in rounding: texts are compared with those of a loop that has the same
        loop = STOCK if label == GGML.label or label in LOOKUP else PLAIN_LOOP.label
        rows.append(first | {
            "ratio_plain": plain["ratio"], "overall_plain": plain["overall"],
            "without_loops": [cut.row(label, base)["overall"] for base in bases],
            "identical": found.identical(label, loop),
        })  # fmt: skip
        if label in bases:
            rows[-1]["tokens_per_step"] = 1.0  # loops without drafts
    return rows


def partings(llm: Llama, prompts: list[Prompt], found: Comparison, label: str) -> list[Parting]:
    """Where the greedy answers of a method leave our plain loop's."""
    pairs = [(t[PLAIN_LOOP.label].tokens, t[label].tokens) for t in found.turns]
    each = (parting(llm, prompt.tokens, *pair) for prompt, pair in zip(prompts, pairs, strict=True))
    return [p for p in each if p is not None]


def alike(row: Row) -> str:
    """How many answers are plain decoding's, and how many leave it where two tokens tie."""
    return cell("{identical}/{answers}", row) + (f", {row['ties']} part at a tie" if row.get("ties") else "")


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """A task's rows as a Markdown table."""
    bases = {rows[0]["method"]: "ratio", PLAIN_LOOP.label: "ratio_plain"}  # over RPC both are the plain loop
    columns: dict[str, Form] = {
        "method": "{method}", "tokens/s": "{tokens_per_second:.1f}", "overall": "{tokens_per_second_overall:.1f}",
        **{f"against {base}": f"{{{key}:.2f}}" for base, key in bases.items()},
        "against both, overall": "{overall:.2f} {overall_plain:.2f}",
        "loops cut": "{without_loops[0]:.2f} {without_loops[1]:.2f}", "tokens/step": "{tokens_per_step:.2f}",
        **{part: f"{{time_split[{part}]:.0%}}" for part in ("draft", "verify", "sample", "host", "rest")},
        "identical": alike,
    }  # fmt: skip
    notes = remark(rows)
    if any(other.server for r in rows if (other := baseline(r["method"]))):
        notes += (
            "llama.cpp's server rounds in ggml's ways: its texts need not be those of our plain decoding.\n"
        )
    return f"### {title}\n\n{table(columns, rows)}{notes}"


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    tasks = read_tasks(args)
    report["tasks"] = []
    with ExitStack() as stack:
        args = stack.enter_context(model_of(args, args.model, needs_heads=False))
        plain, methods, foretold = contestants(args, stack)
        report["threads"] = plain.n_threads
        for task, temp in [(task, temp) for task in tasks for temp in args.temp]:
            prompts = prompts_of(plain, tasks[task], args, temp)
            with stages() as advance:
                found = Comparison(in_turn(methods, prompts, args.rounds, advance))
            rows = judged(found, list(methods))
            if temp == 0 and plain.lossless != "exact":
                for row in (r for r in rows if r["method"] not in (STOCK, *LOOKUP)):
                    left = partings(plain, prompts * args.rounds, found, row["method"])
                    row |= {"ties": sum(p.is_tie for p in left), "partings": [p._asdict() for p in left]}
            report["tasks"].append({"task": task, "temp": temp, "rows": rows})
            text = markdown(f"{task}, temperature {temp:g}", rows)
            if foretold is not None:
                report["tasks"][-1]["replay"] = told = foretold.speed(found, prompts * args.rounds)
                text += said(told)
            yield text
    if (peak := peak_memory_mb()) is not None:
        report["peak_memory_mb"] = peak
        yield f"Peak memory of the process, with all instances of the model: {peak:.0f} MB\n"
