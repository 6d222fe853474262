"""`entmtp train --report`: how good heads are, what they will bring here, and whether to go on training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from ..bank.costs import Costs
from ..bank.traces import Traces
from ..bank.tree import PLAIN
from ..measure import search
from .heads import Shape
from .loop import Measured
from .price import Prices
from .record import Record

RANKS = 4  # guesses that are told of each level
STILL = 0.002  # of the held-out loss: what falls less stands still
APART = 0.06  # loss on held-out text above that on the text trained on: the heads know that by heart


def report(record: Record, prices: Prices) -> dict[str, Any]:
    """All that is told, as JSON has it."""
    costs = costs_of(prices, record.shape, record.n_rows)
    groups = {
        f"{t:g}": [r for r, at in zip(record.ranks, record.temps, strict=True) if at == t]
        for t in sorted(set(record.temps))
    }
    return {
        "arch": record.shape.arch, "lm_head": record.shape.lm_head, "draft_vocab": record.n_rows,
        "step": record.step, "n_steps": record.n_steps,
        "temperatures": {name: _group(ranks, record.shape, costs) for name, ranks in groups.items()},
        "history": [row._asdict() for row in record.history],
        "advice": advice(record.history, record.step, record.n_steps),
    }  # fmt: skip


def costs_of(prices: Prices, shape: Shape, n_rows: int) -> Costs:
    """Costs of steps with these heads; several paths on a level are taken to cost no more than one."""
    heads = [prices.head(shape.lm_head, i, n_rows, shape.block_rows(i)) for i in range(shape.n_heads)]
    return Costs(prices.costs.verify, (0.0, *accumulate(heads)), tuple((us,) * 3 for us in heads))


def _group(ranks: Sequence[npt.NDArray[np.int32]], shape: Shape, costs: Costs) -> dict[str, Any]:
    """Of the texts written at one temperature."""
    found: dict[str, Any] = {"texts": len(ranks), "tokens": sum(map(len, ranks)), "right": right(ranks)}
    n = found["tokens"]
    traces = Traces(
        np.array([len(r) for r in ranks], np.int32), ("",) * len(ranks), tuple(range(len(ranks))),
        np.zeros((n, 3), np.float32), np.concatenate(ranks), np.zeros((n, 0, 0), np.float32), shape.grounded,
    )  # fmt: skip
    tree = search.best_single(traces, costs)
    best, plain = search.static(traces, tree, costs), search.static(traces, PLAIN, costs)
    return found | {
        "tree": search.name(tree),
        "tokens_per_step": round(best.tokens_per_step, 3),
        "tokens_per_second": round(best.speed, 1),
        "plain_tokens_per_second": round(plain.speed, 1),
    }


def right(ranks: Sequence[npt.NDArray[np.int32]]) -> list[list[float]]:
    """By level: share of the first guess, the second, ... that came true where the first guesses before were right."""
    seen = search.node_probabilities(np.concatenate(ranks))
    depth = ranks[0].shape[1]
    rows = []
    for d in range(depth):
        parent = (0,) * d
        p = seen.get(parent, 0.0) if d else 1.0
        rows.append([round(seen.get((*parent, rank), 0.0) / p, 4) if p else 0.0 for rank in range(RANKS)])
    return rows


def advice(history: Sequence[Measured], step: int, n_steps: int) -> str:
    """Whether to go on training, by the trend of the held-out loss, in one sentence."""
    rows = [row for row in history if math.isfinite(row.held_out)]
    if len(rows) < 3:
        return f"too early to say whether to go on: {step} of {n_steps} steps are done"
    before, last = rows[-max(2, len(rows) // 3 + 1)], rows[-1]
    fall = (before.held_out - last.held_out) / before.held_out
    since = f"since step {before.step}"
    if step < n_steps:
        if fall > STILL:
            return f"go on with --resume: the held-out loss fell by {fall:.1%} {since}"
        return (
            f"stop here or go on with --resume, for the learning rate will fall still: the held-out loss "
            f"{'stands still' if fall > -STILL else 'rose'} {since}"
        )
    apart = last.held_out / last.loss - 1
    if apart > APART:
        return f"train with more text (--tokens): the held-out loss is {apart:.0%} above that of the text trained on"
    if fall > STILL:
        return f"train longer (--epochs, --tokens): the held-out loss still fell by {fall:.1%} {since}"
    return f"enough for heads of this size: the held-out loss {'stands still' if fall > -STILL else 'rose'} {since}"


def show(found: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    console.print(
        f"{found['arch']}, projections: {found['lm_head']}, {found['draft_vocab']} tokens, step {found['step']} of "
        f"{found['n_steps']}", highlight=False,
    )  # fmt: skip
    table = Table(title="share of guesses that came true, by level and rank", title_justify="left")
    for name in ("temperature", "level", *(f"guess {i + 1}" for i in range(RANKS))):
        table.add_column(name, justify="right")
    for temperature, group in found["temperatures"].items():
        for level, shares in enumerate(group["right"], 1):
            last = level == len(group["right"])
            table.add_row(temperature, str(level), *(f"{x:.1%}" for x in shares), end_section=last)
    console.print(table)
    table = Table(title="forecast for this machine", title_justify="left")
    for name in ("temperature", "best tree", "tokens/step", "tokens/s", "plain", "gain"):
        table.add_column(name, justify="right")
    for temperature, g in found["temperatures"].items():
        gain = g["tokens_per_second"] / g["plain_tokens_per_second"]
        table.add_row(
            temperature, g["tree"], f"{g['tokens_per_step']:.2f}", f"{g['tokens_per_second']:.0f}",
            f"{g['plain_tokens_per_second']:.0f}", f"{gain:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(found["advice"], highlight=False, soft_wrap=True)
