"""How fast EntMTP will be, said by replay: prompts are decoded plainly, the policy auto runs over what was recorded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bank import PLAIN, Bank, Traces
from ..bank.traces import join
from ..common.errors import UsageError
from .compare import Comparison
from .methods import ENTMTP, PLAIN_LOOP
from .replay import replay_auto
from .rollouts import rollout
from .subject import Subject
from .turns import Prompt


class Foretelling:
    """Follows a model that drafts by itself from answer to answer, as it learns from one to the next.

    Args:
        ours: the model whose speed is foretold; its bank has the costs that it believes in.
        recording: the same model, which decodes plainly for it; its trees are others afterwards.

    Raises:
        UsageError: a model drafts, which no replay can ask.
    """

    def __init__(self, ours: Subject, recording: Subject):
        if "model" in ours.drafters:
            raise UsageError("--replay: a model that drafts cannot be replayed; leave it out with --drafters")
        assert ours.bank is not None
        self.bank, self.recording, self.drafters = ours.bank, recording, ours.drafters
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

    def speed(self, found: Comparison, prompts: Sequence[Prompt]) -> dict[str, float] | None:
        """Speed of EntMTP against our plain loop, all tokens over all seconds: as replay foretells it, and as measured.

        Passes and drafts are foretold, at the speed that the machine had in plain decoding; what a token takes beside
        them, in sampling and in Python, is taken as it was measured, for both loops alike.

        Args:
            prompts: of all turns of `found`, which holds answers of both.
        """
        us = self.answers(prompts)
        told = [(t, x) for t, x in zip(found.turns, us, strict=True) if t in found.pairs]
        n = sum(len(t[ENTMTP.label].tokens) - 1 for t, _ in told)
        if not n:
            return None
        plain, ours = (1e6 * sum(t[k].seconds for t, _ in told) / n for k in (PLAIN_LOOP.label, ENTMTP.label))
        stats = [t[ENTMTP.label].stats for t, _ in told]
        inside = sum(s.time_split["draft"] + s.time_split["verify"] for s in stats if s is not None)
        rest = ours - 1e6 * inside / n
        speed = (plain - rest) / self.us_plain()
        passes = sum(x for _, x in told) / n
        foretold = plain / (speed * passes + rest)
        return {"foretold": foretold, "measured": plain / ours, "speed": speed, "rest_us": rest}


def said(told: dict[str, float] | None) -> str:
    """A line for people."""
    if told is None:
        return ""
    off = told["foretold"] / told["measured"] - 1
    both = f"{told['foretold']:.2f}, measured {told['measured']:.2f}"
    return f"Replay foretells EntMTP's speed against plain decoding, overall: {both} ({off:+.1%}).\n"
