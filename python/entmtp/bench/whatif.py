"""`entmtp bench what-if` and `ablate`: what the policies, and parts of them, would be worth on another machine.

Acceptance comes from real text and real heads, as rank traces; costs are measured on the model that is named, or on
one of useful size with random weights, or are a curve from elsewhere.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

from ..bank import Costs, Traces, Tree
from ..bank.costs import relative
from ..common.progress import stages
from ..measure import search
from ..measure.fitting import fit
from ..measure.judge import judge
from ..measure.timing import measure
from ..measure.turns import Advance
from ..options import load
from ..report.tables import Form, table
from .inputs import model_of, trace_files

# Costs relative to a pass of one token, where a model of the shape cannot be run here. A draft of one level is a
# twentieth of a pass where memory bounds it (four heads of Vicuna-7B are 9 % of the model, and a step runs two or
# three), a fortieth on a GPU.
CURVES: dict[str, tuple[dict[int, float], float]] = {
    # 2 cores, ggml's kernels, a 1B-shape model in Q8_0 (docs/benchmarks.md)
    "cpu-q8_0": (
        {1: 1, 2: 1.26, 3: 1.51, 4: 1.77, 5: 2.41, 6: 2.63, 8: 2.28, 12: 2.97, 16: 3.8, 32: 7, 64: 14}, 0.05,
    ),
    # 2 cores, our kernels, SmolLM2-135M-Instruct with its Hydra heads (docs/kernels.md)
    "cpu-smollm2": ({1: 1, 2: 1.16, 3: 1.3, 4: 1.38, 6: 1.7, 8: 2.3, 16: 3.8, 32: 7.2, 64: 14}, 0.035),
    "roofline": ({1: 1, 4: 1.05, 8: 1.86, 16: 3.7, 64: 14.8}, 0.05),  # the same, bound by reading the weights once
    "flat": ({1: 1, 64: 1.3}, 0.025),  # a GPU: a pass of 64 tokens costs hardly more than one
}  # fmt: skip
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)  # passes that are timed
NO_HEADS = "none"  # kind of heads of traces without any
SINGLE, POLICIES = "best single tree", ("entropy", "confidence")
ROWS = (SINGLE, "published 63-node tree", *POLICIES, "oracle")


def costs_of(args: Namespace, curve: str, arch: str, advance: Advance) -> Costs:
    """Costs of a curve from elsewhere, or of a model with heads of `arch`, measured here."""
    if curve in CURVES:
        verify, level = CURVES[curve]
        return relative(verify, [level * d for d in range(5)])
    n_ctx = max(args.ctx or 0, 512)
    with (
        model_of(args, curve, arch=arch, needs_heads=arch != NO_HEADS) as found,
        closing(load(found, policy="off", n_ctx=n_ctx)) as llm,
    ):
        return replace(measure(llm, SIZES, contexts=(64,), n_rounds=3, progress=advance), key=None)


def priced(args: Namespace, curve: str, advance: Advance) -> Iterator[tuple[str, Traces, str, Costs]]:
    """(name, traces, kind of heads, costs) of every trace file."""
    known: dict[str, Costs] = {}
    for file in trace_files(args.traces):
        traces = Traces.load(file)
        arch = str(traces.about.get("heads", ["", "medusa"])[1])
        if arch not in known:
            known[arch] = costs_of(args, curve, arch, advance)
        yield file.stem, traces, arch, known[arch]


def replayed(traces: Traces, costs: Costs) -> tuple[Tree, dict[str, Any]]:
    """The best single tree, and what `judge` finds on the half of the prompts that nothing is fitted to."""
    if not traces.n_heads:
        raise ValueError("these traces are of a model without heads, which only ablate can use")
    fitted, held_out = traces.split()
    single = search.best_single(fitted, costs)
    return single, judge(held_out, fit(fitted, costs), single)


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    """Every policy on every trace file under each curve."""
    report["what_if"] = []
    for curve in args.curves or [args.model]:
        rows, known = [], dict[str, Costs]()
        with stages() as advance:
            for name, traces, arch, costs in priced(args, curve, advance):
                single, judged = replayed(traces, costs)
                found = {r: judged[r]["speed"] for r in ROWS}
                rows.append({"traces": name, "single": search.name(single), **found})
                known[arch] = costs
        shown = {arch: costs.to_json() for arch, costs in known.items()}
        report["what_if"].append({"curve": curve, "rows": rows, "costs": shown})
        yield f"#### costs: {curve}\n\n{markdown(rows, known)}"


def markdown(rows: list[dict[str, Any]], known: dict[str, Costs]) -> str:
    """Speeds against plain decoding, the policies against the best single tree in brackets; and the costs."""
    columns: dict[str, Form] = {"traces": "{traces}", **{row: f"{{{row}:.3f}}" for row in ROWS}}
    columns[SINGLE] = f"{{{SINGLE}:.3f}} {{single}}"
    columns |= {policy: f"{{{policy}:.3f}} ({{against[{policy}]:.3f}})" for policy in POLICIES}
    text = table(columns, [r | {"against": {p: r[p] / r[SINGLE] for p in POLICIES}} for r in rows])
    for arch, c in known.items():
        one = c.curve()[0]
        passes = [f"{n}:{us / row[1]:.2f}" for row in c.verify.values() for n, us in sorted(row.items())]
        text += (
            f"\n{arch}: a pass of one token takes {one / 1e3:.1f} ms; relative to it, passes by tokens\n"
            f"{' '.join(passes)}; drafts by depth {' '.join(f'{us / one:.3f}' for us in c.chain[1:])}\n"
        )
    return text
