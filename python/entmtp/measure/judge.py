"""What policies are worth on held-out traces, by replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..bank.bank import Bank
from ..bank.traces import Traces
from ..bank.tree import Tree
from ..native.arrays import PUBLISHED
from ..native.heads import Heads
from . import search
from .replay import Replay, replay, replay_auto

AUTO, AUTO_LEARNED = "auto", "auto, weights for the task"


def autos(traces: Traces, bank: Bank, heads: Heads | None, drafters: Sequence[str]) -> dict[str, Replay]:
    """The policy auto with the library's acceptance model, and with the bank's if it has one."""
    if traces.texts is None:
        return {}
    runs = {AUTO: replay_auto(traces, replace(bank, acceptance_model=None), heads, drafters=drafters)}
    if bank.acceptance_model is not None:
        runs[AUTO_LEARNED] = replay_auto(traces, bank, heads, drafters=drafters)
    return runs


def judge(
    traces: Traces, bank: Bank, single: Tree, heads: Heads | None = None,
    drafters: Sequence[str] = ("text", "recycling", "heads"),
) -> dict[str, Any]:  # fmt: skip
    """Every policy on held-out traces, as speed relative to plain decoding; tokens/s counts the whole step.

    Args:
        heads: those that the traces were recorded with; without them the policy auto drafts from the text alone.
        drafters: who drafts under the policy auto.
    """
    costs = bank.need_costs()
    if not traces.n_heads:
        plain = replay_auto(traces, bank, drafters=())
        return rows_of({"plain": plain} | autos(traces, bank, None, drafters))
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
    rows = rows_of(runs | autos(traces, bank, heads, drafters))
    ideal = search.oracle(traces, costs) * 1e6
    rows["oracle"] = {"speed": round(plain.us / ideal, 4)}
    return rows


def rows_of(runs: dict[str, Replay]) -> dict[str, Any]:
    """Figures of each run; speed is against plain decoding."""
    plain = runs["plain"]
    return {
        name: {
            "speed": round(plain.us / r.us, 4),
            "tokens_per_second": round(r.speed, 1),
            "tokens_per_step": round(r.tokens_per_step, 3),
        }
        for name, r in runs.items()
    }
