"""Banks, costs and traces as the native library takes them: C arrays that live as long as a call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..bank import Bank, Calibration, Costs, Traces, Tree
from ..bank.acceptance import as_array
from ..bank.calibration import N_GUESS
from ..common.errors import BankError
from . import abi as n
from . import abi_replay

POLICIES = tuple(n.POLICIES)
SCORES = tuple(n.SCORES)
PRICED = ("entropy", "confidence", "best-depth", "auto")  # they need costs
NEED_HEADS = ("entropy", "confidence", "ladder", "hysteresis", "best-depth")
PUBLISHED = ("ladder", "hysteresis", "best-depth")


class Arrays:
    """Keeps the memory of C arrays while a call uses it: `with Arrays() as arrays: call(arrays.policy(...))`."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def __enter__(self) -> Arrays:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.clear()

    def _floats(self, values: Any) -> Any:
        array = np.ascontiguousarray(values, dtype=np.float32)
        self._kept.append(array)
        return array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def _ints(self, values: Any) -> Any:
        array = np.ascontiguousarray(values, dtype=np.int32)
        self._kept.append(array)
        return array.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))

    def trees(self, trees: Sequence[Tree]) -> tuple[Any, ...]:
        """n_trees, n_nodes, parent, rank."""
        arrays = (
            [t.n_nodes for t in trees],
            np.concatenate([t.parent for t in trees]),
            np.concatenate([t.rank for t in trees]),
        )
        return (len(trees), *(self._ints(a) for a in arrays))

    def trace(self, traces: Traces) -> Any:
        """`struct entmtp_trace`."""
        arrays = (traces.n_tokens, traces.signals, traces.ranks, traces.log_p)
        self._kept += arrays
        n_tokens, signals, rank, log_p = (a.ctypes.data for a in arrays)
        return abi_replay.Trace(
            n_texts=len(traces.n_tokens), n_tokens=n_tokens, n_heads=traces.n_heads, n_guess=N_GUESS,
            signals=signals, rank=rank, log_p=log_p, sees_path=traces.sees_path,
        )  # fmt: skip

    def texts(self, traces: Traces) -> Any:
        """`struct entmtp_texts` of traces that hold their texts."""
        texts = traces.texts
        assert texts is not None
        arrays = (
            texts.n_prompt,
            traces.n_tokens,
            texts.tokens,
            traces.signals,
            texts.best,
            texts.log_p,
            texts.states,
        )
        self._kept += arrays
        n_prompt, n_tokens, tokens, signals, best, log_p, states = (a.ctypes.data for a in arrays)
        return abi_replay.Texts(
            n_texts=len(traces.n_tokens), n_prompt=n_prompt, n_tokens=n_tokens, tokens=tokens, signals=signals,
            n_best=texts.best.shape[1], best=best, log_p=log_p, states=states if texts.states.size else None,
        )  # fmt: skip

    def costs(self, costs: Costs, trees: Sequence[Tree], context: int | None = None) -> Any:
        """`struct entmtp_costs *`."""
        curve = costs.curve(context)
        s = n.Costs(
            n_verify=len(curve),
            verify=self._floats(curve),
            n_levels=len(costs.level),
            level=self._floats(costs.level),
            tree=self._floats([costs.draft(t) for t in trees]),
            build=costs.build,
        )
        self._kept.append(s)
        return ctypes.pointer(s)

    def calibration(self, c: Calibration) -> Any:
        """`struct entmtp_calibration *`."""
        s = n.Calibration(
            n_levels=c.n_levels,
            hits=c.hits,
            hits_window=c.hits_window,
            accept=self._floats(c.accept),
            n_bins=c.scenarios.shape[1],
            n_scenarios=c.scenarios.shape[2],
            ahead=self._floats(c.ahead),
            edges=self._floats(c.edges),
            scenarios=self._floats(c.scenarios),
        )
        self._kept.append(s)
        return ctypes.pointer(s)

    def policy(
        self,
        bank: Bank,
        policy: str,
        static_tree: int = 0,
        *,
        score: str = "entropy",
        adapt: bool = True,
        context: int | None = None,
        drafters: Sequence[str] = (),
        acceptance: Any = None,
    ) -> Any:
        """`struct entmtp_policy_params *` for a policy over a bank.

        Args:
            policy: one of POLICIES.
            static_tree: index in the bank, for `static`.
            score: what a published policy follows: `entropy`, `top1` or `path`.
            adapt: costs and acceptance follow what is seen, and drafting stops where it loses (entropy, confidence).
            drafters: who drafts (auto), names of `abi.SOURCES`.
            acceptance: weights of the acceptance model to begin with, [N_SETS, N_INPUTS] (auto); None: the bank's, or
                the library's.
            context: depth that costs are taken for; None: the bank's own.

        Raises:
            BankError: the bank lacks what the policy needs.
        """
        p = n.PolicyParams(
            policy=n.POLICIES[policy],
            static_tree=static_tree,
            ema_window=bank.ema_window,
            n_bins=1,
            criterion=n.CRITERIA[bank.criterion],
            score=n.SCORES[score],
            adapt=adapt,
        )
        if policy == "entropy":
            p.n_bins = len(bank.bin_edges) + 1
            p.bin_edges = self._floats(bank.bin_edges)
            p.expected = self._floats(bank.expected())
        elif policy in ("ladder", "hysteresis"):
            if score not in bank.published:
                raise BankError(
                    f"bank {bank.name} has no ladder for the score {score}: entmtp tune makes one"
                )
            ladder = bank.published[score]
            edges, trees = list(ladder.edges), list(ladder.trees)
            if policy == "hysteresis":
                # between the ends of the ladder: down at the first edge, up at the last
                edges = [edges[0], max(edges[-1], edges[0] * 1.0001 + 1e-6)] if edges else [0.5, 1.0]
                trees = [trees[0], trees[-1], trees[-1]]
            p.n_bins, p.bin_edges, p.ladder = len(trees), self._floats(edges), self._ints(trees)
        if policy in PRICED:
            p.costs = self.costs(bank.need_costs(), bank.trees, context)
        if policy == "confidence" and bank.calibration is None:
            raise BankError(
                f"bank {bank.name} has no calibration of the heads: policy confidence needs one from "
                "entmtp tune"
            )
        if bank.calibration is not None and policy in ("confidence", "auto"):
            p.calibration = self.calibration(bank.calibration)
        if policy == "auto":
            p.drafters = sum(n.SOURCES[name] for name in drafters)
            if acceptance is None and bank.acceptance_model is not None:
                acceptance = as_array(bank.acceptance_model)
            if acceptance is not None:
                p.acceptance = self._floats(acceptance)
        self._kept.append(p)
        return ctypes.pointer(p)
