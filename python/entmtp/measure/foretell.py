"""How fast EntMTP will be, said by replay: prompts are decoded plainly, the policy auto runs over what was recorded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bank import PLAIN, Bank, Traces
from ..bank.traces import join
from .replay import replay_auto
from .rollouts import rollout
from .subject import Subject
from .turns import Prompt


class Foretelling:
    """Follows a model that drafts by itself from answer to answer, as it learns from one to the next.

    Args:
        ours: the model whose speed is foretold; its bank has the costs that it believes in.
        recording: the same model, which decodes plainly for it; its trees are others afterwards.
    """

    def __init__(self, ours: Subject, recording: Subject, drafters: Sequence[str]):
        assert ours.bank is not None
        self.bank, self.recording, self.drafters = ours.bank, recording, drafters
        self.traces: list[Traces] = []

    def answers(self, prompts: Sequence[Prompt]) -> list[float]:
        """Microseconds of the passes and drafts of each answer, from its first token on, by the costs of the bank."""
        llm = self.recording
        llm.set_trees(Bank("off", (PLAIN,)), policy="off")
        for p in prompts:
            llm.set_seed(p.seed)
            self.traces.append(rollout(llm, list(p.tokens), p.n_tokens, ranks_too=False, temp=p.temp))
        heads = llm.draft_heads if llm.heads_path else None
        done = replay_auto(join(self.traces), self.bank, heads, drafters=self.drafters).steps
        us = np.concatenate([[0.0], np.cumsum(done["t_draft_us"] + done["t_verify_us"], dtype=np.float64)])
        made = np.concatenate([[0], np.cumsum(1 + done["n_accepted"])])
        ends = np.cumsum(
            [0, *(int(t.n_tokens[0]) - 1 for t in self.traces)]
        )  # the last token is not evaluated
        at = us[np.searchsorted(made, ends)]
        return np.diff(at)[-len(prompts) :].tolist()

    def us_plain(self) -> float:
        """Microseconds of a pass over one token, by the same costs."""
        return float(self.bank.need_costs().curve()[0])
