"""Drafting whatever it costs, so that short answers of small models draft a lot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from entmtp import Bank, Llama
from entmtp.bank import Costs
from entmtp.bank.acceptance import N_INPUTS, N_SETS

# a second for a pass of any size, so that nothing that drafts is too dear
CHEAP = Costs(verify={64: {1: 1e6, 2: 1.001e6, 64: 1.01e6}}, chain=(0.0,), level=())


def draft_a_lot(llm: Llama, drafters: Sequence[str] | None = None, bias: float | None = 3.0) -> Llama:
    """Have a model draft from all that is proposed.

    Args:
        bias: logit of every proposal, whoever made it; None: as they are judged.
    """
    llm._calibrate = False
    llm._settings |= {"adapt": False}
    if bias is not None:
        weights = np.zeros((N_SETS, N_INPUTS), np.float32)
        weights[:, 0] = bias
        llm._settings |= {"acceptance": weights}
    llm.set_trees(replace(Bank.without_heads(), costs=CHEAP), policy="auto", drafters=drafters)
    return llm
