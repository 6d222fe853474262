"""The decoding methods that the demo and the benchmark compare, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from ..bank.bank import Bank, names
from ..bank.tree import PLAIN
from ..native.arrays import PUBLISHED, SCORES
from .subject import Subject


@dataclass(frozen=True)
class Method:
    """One way to decode with a model that has heads.

    Attributes:
        label: how it is called in tables.
        bank: name of the bank, None for the generic one of the heads' kind.
        tree: one tree of the bank, for the static policy.
        policy: as in `entmtp.Llama`.
        score: what a published policy follows.
    """

    label: str
    bank: str | None
    policy: str
    tree: str | None = None
    score: str = "entropy"

    def apply(self, llm: Subject) -> None:
        """Decode with this method from now on."""
        if self.policy == "off":
            llm.set_trees(Bank("plain", (PLAIN,)), policy="off")
            return
        bank = Bank.load(self.bank or f"generic-{llm.draft_heads.arch}").pruned(llm.draft_heads.n_heads)
        if self.tree:
            bank = Bank(bank.name, (PLAIN, bank.trees[bank.index(self.tree)]))
        llm.set_trees(bank, policy=self.policy, score=self.score)


PLAIN_LOOP = Method("plain", None, "off")
ENTMTP = Method("EntMTP", None, "entropy")
CONFIDENCE = Method("EntMTP, confidence", None, "confidence")


def comparison() -> list[Method]:
    """The published policies with every score they know."""
    return [
        Method(f"{policy}, {score}", None, policy, score=score) for policy in PUBLISHED for score in SCORES
    ]


def published() -> list[Method]:
    """The trees that Medusa and Hydra were published with, each as a static method."""
    return [Method(name, name, "static") for name in names() if Bank.load(name).acceptance is None]


def generic(arch: str) -> list[Method]:
    """Every tree of the generic bank, each as a static method."""
    bank = Bank.load(f"generic-{arch}")
    return [Method(f"static {t.name}", None, "static", t.name) for t in bank.trees if t.n_nodes > 1]
