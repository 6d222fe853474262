"""What the policies would be worth on another machine: recorded traces, replayed under other costs.

Acceptance comes from real text and real heads; costs are measured on a model of useful size with random weights, or
are a curve from elsewhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bank.bank import Bank
from ..bank.costs import Costs, relative
from ..bank.traces import Traces
from ..bank.tree import PLAIN
from ..llama import Llama
from ..measure import calibration, search
from ..measure.fitting import fit
from ..measure.judge import judge
from ..measure.replay import replay
from ..measure.timing import measure
from ..models.shapes import SHAPES, write_heads, write_model

# Costs relative to a pass of one token, where a model of the shape cannot be run here. A draft of one level is a
# twentieth of a pass where memory bounds it (four heads of Vicuna-7B are 9 % of the model, and a step runs two or
# three), a fortieth on a GPU.
CURVES = {
    # 2 cores, ggml's kernels, a 1B-shape model in Q8_0 (docs/benchmarks.md)
    "cpu-q8_0": (
        {1: 1, 2: 1.26, 3: 1.51, 4: 1.77, 5: 2.41, 6: 2.63, 8: 2.28, 12: 2.97, 16: 3.8, 32: 7.0, 64: 14.0},
        0.05,
    ),
    # the same if a pass cost what reading the weights once costs
    "roofline": ({1: 1, 4: 1.05, 8: 1.86, 16: 3.7, 64: 14.8}, 0.05),
    # a GPU: a pass of 64 tokens costs hardly more than one
    "flat": ({1: 1, 64: 1.3}, 0.025),
}
ROWS = ("best single tree", "published 63-node tree", "entropy", "confidence", "oracle")


def shape_costs(
    name: str, arch: str, n_threads: int, report: Callable[[str, int, int], None] | None = None
) -> Costs:
    """Measured costs of a random-weight model of a shape, with heads of `arch`."""
    with tempfile.TemporaryDirectory(prefix="entmtp-shape-") as folder:
        model = write_model(Path(folder) / "model.gguf", SHAPES[name])
        heads = write_heads(Path(folder) / "heads.gguf", model, SHAPES[name], arch)
        llm = Llama(
            model, draft="entmtp", heads=heads, policy="off", n_ctx=512, n_threads=n_threads, n_threads_batch=n_threads,
            verbose=False,
        )  # fmt: skip
        try:
            sizes = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
            return replace(measure(llm, sizes, contexts=(64,), n_rounds=3, progress=report), key=None)
        finally:
            llm.close()


def run(
    folder: str | Path, curve: str, n_threads: int, report: Callable[[str, int, int], None] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Costs]]:
    """Replay every trace file of a folder under one curve: a row of speeds against plain decoding each.

    Args:
        curve: a key of CURVES, or of `entmtp.shapes.SHAPES`, which is measured here.
    """
    files = sorted(Path(folder).glob("*.npz"))
    if not files:
        raise ValueError(
            f"{folder} holds no trace files (.npz): python -m entmtp.bench --study --traces {folder} makes them"
        )
    known: dict[str, Costs] = {}
    rows = []
    for file in files:
        traces = Traces.load(file)
        arch = str(traces.about.get("heads", ["", "medusa"])[1])
        if arch not in known:
            if curve in CURVES:
                verify, level = CURVES[curve]
                known[arch] = relative(
                    {n: float(c) for n, c in verify.items()}, [level * d for d in range(5)]
                )
            else:
                known[arch] = shape_costs(curve, arch, n_threads, report)
        costs = known[arch]
        fitted, held_out = traces.split()
        bank = fit(fitted, costs)
        single = search.best_single(fitted, costs)
        judged = judge(held_out, bank, single)
        rows.append(
            {"traces": file.stem, "single": search.name(single), **{r: judged[r]["speed"] for r in ROWS}}
        )
    return rows, known


def markdown(rows: list[dict[str, Any]]) -> str:
    """Speeds against plain decoding; the policies against the best single tree in brackets."""
    lines = [
        "| traces | best single tree | published 63-node tree | entropy | confidence | oracle |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for r in rows:
        single = r["best single tree"]
        policies = [f"{r[p]:.3f} ({r[p] / single:.3f})" for p in ("entropy", "confidence")]
        cells = [r["traces"], f"{single:.3f} {r['single']}", f"{r['published 63-node tree']:.3f}", *policies]
        lines.append(f"| {' | '.join(cells)} | {r['oracle']:.3f} |")
    return "\n".join(lines) + "\n"


# what the confidence policy is changed in, to see what each part is worth
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "without hits": {"without": ("hits",)},
    "without the entropy of the head's guesses": {"without": ("spread",)},
    "without running entropy": {"without": ("running entropy",)},
    "without any entropy of the base": {"without": ("running entropy", "entropy", "root")},
    "head probabilities uncalibrated by anything else": {
        "without": ("running entropy", "entropy", "rank", "path", "hits", "spread", "root")
    },
    "entropy window 2": {"window": 2.0},
    "entropy window 32": {"window": 32.0},
    "3 bins of 3 scenarios": {"n_bins": 3, "n_scenarios": 3},
    "12 bins of 6 scenarios": {"n_bins": 12, "n_scenarios": 6},
    "one scenario: means instead of distributions": {"n_scenarios": 1},
    "hits over 15 steps": {"hits_window": 15.0},
    "hits over 120 steps": {"hits_window": 120.0},
    "not adapting": {"adapt": False},
}


def ablation(folder: str | Path, curve: str) -> dict[str, list[float]]:
    """Speed of variants of the policies against the best single tree: one figure per trace file.

    Args:
        curve: a key of CURVES.
    """
    verify, level = CURVES[curve]
    costs = relative({n: float(c) for n, c in verify.items()}, [level * d for d in range(5)])
    result: dict[str, list[float]] = {}
    for file in sorted(Path(folder).glob("*.npz")):
        fitted, held_out = Traces.load(file).split()
        single = search.static(held_out, search.best_single(fitted, costs), costs).us
        for name, change in VARIANTS.items():
            settings = {"window": 8.0} | change
            adapt = settings.pop("adapt", True)
            bank = Bank(
                "",
                (PLAIN,),
                ema_window=settings["window"],
                costs=costs,
                calibration=calibration.fit(fitted, **settings),
            )
            us = replay(held_out, bank, "confidence", adapt=adapt).us
            result.setdefault(f"confidence, {name}", []).append(single / us)
        for window in (2.0, 8.0, 32.0):
            for n_bins in (1, 4, 7):
                for criterion in ("ratio", "price"):
                    bank = search.bin_bank(fitted, costs, window, n_bins, criterion)
                    us = replay(held_out, bank, "entropy").us
                    name = f"entropy, window {window:g}, {n_bins} bins, {criterion}"
                    result.setdefault(name, []).append(single / us)
    return result
