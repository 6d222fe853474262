"""What policies are worth on held-out traces, by replay."""

from __future__ import annotations

from typing import Any

from ..bank.bank import Bank
from ..bank.traces import Traces
from ..bank.tree import Tree
from ..native.arrays import PUBLISHED
from . import search
from .replay import replay


def judge(traces: Traces, bank: Bank, single: Tree) -> dict[str, Any]:
    """Every policy on held-out traces, as speed relative to plain decoding; tokens/s counts the whole step."""
    costs = bank.need_costs()
    plain = replay(traces, bank, "off")
    published = Bank.load("mc_sim_7b_63").pruned(traces.n_heads)
    runs = {
        "plain": plain,
        "best single tree": search.static(traces, single, costs),
        "published 63-node tree": search.static(traces, published.trees[1], costs),
        "entropy": replay(traces, bank, "entropy"),
        "confidence": replay(traces, bank, "confidence"),
    }
    for policy in PUBLISHED:
        for score in bank.published:
            runs[f"{policy}, {score}"] = replay(traces, bank, policy, score=score)
    rows = {
        name: {
            "speed": round(plain.us / r.us, 4),
            "tokens_per_second": round(r.speed, 1),
            "tokens_per_step": round(r.tokens_per_step, 3),
        }
        for name, r in runs.items()
    }
    ideal = search.oracle(traces, costs) * 1e6
    rows["oracle"] = {"speed": round(plain.us / ideal, 4)}
    return rows
