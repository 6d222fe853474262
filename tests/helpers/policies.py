"""The demo's methods on a machine where drafting pays: policies that weigh costs draft, whatever runs the tests."""

from __future__ import annotations

from dataclasses import replace

from entmtp import Llama
from entmtp.bank.costs import relative
from entmtp.measure.methods import Method

# relative to a pass of one token, and such that trees of several sizes are chosen
PAYING = relative(
    {1: 1.0, 2: 1.02, 4: 1.05, 8: 1.1, 16: 1.22, 32: 1.5, 64: 2.2}, chain=[0.0, 0.01, 0.02, 0.03, 0.04]
)
# the same for trees that are grown from all drafters: these would take all the nodes that cost next to nothing
PAYING_NODES = relative(
    {1: 1.0, 2: 1.1, 4: 1.25, 8: 1.6, 16: 2.8, 64: 13.0}, chain=[0.0, 0.01, 0.02, 0.03, 0.04]
)


def apply(method: Method, llm: Llama) -> None:
    """Decode with a method from now on. Costs stay PAYING in a model with `adapt=False`."""
    method.apply(llm)
    if llm.policy not in ("off", "static"):
        assert llm.bank is not None
        costs = PAYING_NODES if method.policy == "auto" else PAYING
        llm.set_trees(replace(llm.bank, costs=costs), policy=method.policy, score=method.score)
