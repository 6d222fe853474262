"""Any policy over recorded traces, without the model: the decoder's own scheduler, fed with what the traces hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bank.bank import Bank
from ..bank.costs import Costs
from ..bank.traces import Traces
from ..native import abi as n
from ..native.arrays import Arrays
from ..native.stats import STEP_DTYPE


@dataclass
class Replay:
    """What a policy did.

    Attributes:
        steps: one record per step, see `entmtp.stats.STEP_DTYPE`; draft and verify times are costs of the table.
        n_tokens: tokens evaluated.
        costs: that the steps were priced with.
    """

    steps: npt.NDArray[np.void] = field(repr=False)
    n_tokens: int
    costs: Costs

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
        count = n.replay(
            arrays.trace(traces), *arrays.trees(bank.trees), params, arrays.costs(truth, bank.trees, context),
            steps.ctypes.data, len(steps),
        )  # fmt: skip
    n.check(min(count, 0))
    steps = steps[:count]
    return Replay(steps, int(count + steps["n_accepted"].sum()), truth)
