"""Any policy over recorded traces, without the model: the decoder's own scheduler, fed with what the traces hold.

The policy `auto` drafts from the text itself: it is replayed over the texts of the traces, and asks the heads, if
there are any, what they guess after the paths that it chooses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bank.acceptance import INPUTS
from ..bank.bank import Bank
from ..bank.costs import Costs
from ..bank.traces import Traces
from ..native import abi as n
from ..native import abi_replay
from ..native.arrays import Arrays
from ..native.heads import Heads
from ..native.stats import PROPOSAL_DTYPE, STEP_DTYPE

AGREEMENT = "agreement"  # may be left out as an input: then only the first of several drafters counts


@dataclass
class Replay:
    """What a policy did.

    Attributes:
        steps: one record per step, see `entmtp.stats.STEP_DTYPE`; draft and verify times are costs of the table.
        n_tokens: tokens evaluated.
        costs: that the steps were priced with.
        proposals: of the policy auto, if they are wanted: see `PROPOSAL_DTYPE` of native/stats.py.
    """

    steps: npt.NDArray[np.void] = field(repr=False)
    n_tokens: int
    costs: Costs
    proposals: npt.NDArray[np.void] | None = field(default=None, repr=False)

    @property
    def tokens_per_step(self) -> float:
        return self.n_tokens / max(len(self.steps), 1)

    @property
    def us(self) -> float:
        """Draft and verify time of the texts."""
        return float(self.steps["t_draft_us"].sum() + self.steps["t_verify_us"].sum())

    @property
    def us_total(self) -> float:
        """The same with sampling, host and caller."""
        per_token = self.costs.sample + self.costs.token
        return self.us + len(self.steps) * self.costs.host + self.n_tokens * per_token

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return 1e6 * self.n_tokens / max(self.us_total, 1e-9)


def replay(
    traces: Traces,
    bank: Bank,
    policy: str,
    static_tree: int = 0,
    *,
    costs: Costs | None = None,
    context: int | None = None,
    **settings: Any,
) -> Replay:
    """Run a policy over traces.

    Args:
        bank, policy, static_tree, settings: as in `entmtp.policy.Arrays.policy`.
        costs: what steps really cost; None: the bank's costs, which the policy believes in.
        context: depth of these costs; None: their own.
    """
    truth = costs or bank.need_costs()
    steps = np.zeros(int(traces.n_tokens.sum()) + 1, dtype=STEP_DTYPE)
    with Arrays() as arrays:
        params = arrays.policy(bank, policy, static_tree, context=context, **settings)
        count = abi_replay.replay(
            arrays.trace(traces), *arrays.trees(bank.trees), params, arrays.costs(truth, bank.trees, context),
            steps.ctypes.data, len(steps),
        )  # fmt: skip
    n.check(min(count, 0))
    steps = steps[:count]
    return Replay(steps, int(count + steps["n_accepted"].sum()), truth)


def replay_auto(
    traces: Traces,
    bank: Bank,
    heads: Heads | None = None,
    *,
    drafters: Sequence[str] = ("text", "recycling", "heads"),
    without: Sequence[str] = (),
    proposals: bool = False,
    costs: Costs | None = None,
    context: int | None = None,
    **settings: Any,
) -> Replay:
    """Run the policy auto over the texts of traces.

    Args:
        heads: those that the traces were recorded with; None: they do not draft.
        drafters: who drafts; a model that does cannot be replayed.
        without: inputs that the acceptance model is not given, names of `INPUTS` of bank/acceptance.py or AGREEMENT.
        proposals: keep every proposal that was judged at a place that the text went through.
        costs, context, settings: as in `replay`.

    Raises:
        ValueError: the traces hold no texts, or those of another model.
    """
    if traces.texts is None:
        raise ValueError("these traces hold no texts, which the policy auto drafts from: record them again")
    n_embd = traces.texts.states.shape[1]
    if heads is not None and n_embd not in (0, heads.info.n_embd):
        raise ValueError(
            f"these traces hold hidden states of {n_embd} values, the heads read {heads.info.n_embd}: record them again"
        )
    who = [name for name in drafters if name != "heads" or (heads is not None and traces.n_heads > 0)]
    bits = sum(1 << (len(INPUTS) if name == AGREEMENT else INPUTS.index(name)) for name in without)
    truth = costs or bank.need_costs()
    n_tokens = int(traces.n_tokens.sum())
    steps = np.zeros(n_tokens + 1, dtype=STEP_DTYPE)
    found = np.zeros(n_tokens * abi_replay.MAX_SAMPLES if proposals else 0, dtype=PROPOSAL_DTYPE)
    n_found = ctypes.c_int64()
    with Arrays() as arrays:
        params = arrays.policy(bank, "auto", context=context, drafters=who, **settings)
        count = abi_replay.replay_texts(
            ctypes.byref(arrays.texts(traces)), heads._ptr if "heads" in who and heads is not None else None, params,
            arrays.costs(truth, bank.trees, context), bits, steps.ctypes.data, len(steps),
            found.ctypes.data if proposals else None, ctypes.byref(n_found),
        )  # fmt: skip
    n.check(min(count, 0))
    steps = steps[:count]
    kept = found[: n_found.value].copy() if proposals else None
    return Replay(steps, int(count + steps["n_accepted"].sum()), truth, kept)
