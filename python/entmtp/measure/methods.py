"""The decoding methods that the demo and the benchmark compare, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from ..bank import PLAIN, Bank, Tree, names
from ..native.arrays import PUBLISHED, SCORES
from .subject import Subject


@dataclass(frozen=True)
class Method:
    """One way to decode with a model that drafts."""

    label: str  # how it is called in tables
    bank: str | None  # its name, None for the generic one of the heads' kind
    policy: str  # as in `entmtp.Llama`
    tree: str | None = None  # one tree of the bank, for the static policy
    score: str = "entropy"  # what a published policy follows
    drafters: str = "auto"  # who drafts, under the policy auto
    chain: int = 0  # in place of a bank: always so many tokens in a row

    def apply(self, llm: Subject) -> None:
        """Decode with this method from now on."""
        if self.policy == "off":
            llm.set_trees(Bank("plain", (PLAIN,)), policy="off")
            return
        if self.chain:
            paths = [[0] * (d + 1) for d in range(self.chain)]
            bank = Bank("chain", (PLAIN, Tree.from_paths(f"chain-{self.chain}", paths)))
        elif llm.heads_path:
            bank = Bank.load(self.bank or f"generic-{llm.draft_heads.arch}").pruned(llm.draft_heads.n_heads)
        else:
            bank = Bank.load(self.bank) if self.bank else Bank.without_heads()
        if self.tree:
            bank = Bank(bank.name, (PLAIN, bank.trees[bank.index(self.tree)]))
        llm.set_trees(bank, policy=self.policy, score=self.score, drafters=self.drafters)


PLAIN_LOOP = Method("plain", None, "off")
ENTMTP = Method("EntMTP", None, "auto")
TEXT_ALONE = Method("EntMTP, text", None, "auto", drafters="text,recycling")
HEADS_ALONE = Method("EntMTP, heads", None, "auto", drafters="heads")
MODEL_ALONE = Method("EntMTP, model", None, "auto", drafters="model")
ENTROPY = Method("EntMTP, entropy", None, "entropy")
CONFIDENCE = Method("EntMTP, confidence", None, "confidence")


def comparison() -> list[Method]:
    """The published policies with every score they know."""
    return [Method(f"{p}, {score}", None, p, score=score) for p in PUBLISHED for score in SCORES]


def published() -> list[Method]:
    """The trees that Medusa and Hydra were published with, each as a static method."""
    return [Method(name, name, "static") for name in names() if Bank.load(name).acceptance is None]


def chains(longest: int = 4) -> list[Method]:
    """A model that drafts always so many tokens, as llama.cpp's does."""
    return [Method(f"chain of {n}", None, "static", chain=n) for n in range(1, longest + 1)]


def methods_of(arch: str | None, has_model: bool) -> tuple[list[Method], list[Method]]:
    """What a model can be asked to: methods that stay as they are, and those that learn from answer to answer.

    Args:
        arch: kind of its heads, None without.
        has_model: another model drafts for it.
    """
    learning = [TEXT_ALONE] * (bool(arch) or has_model) + [MODEL_ALONE] * has_model
    learning += [HEADS_ALONE, ENTROPY, CONFIDENCE, ENTMTP] if arch else [ENTMTP]
    if has_model and not arch:
        return [*chains(), *comparison()], learning
    return [*published(), *(generic(arch) if arch else ()), *comparison()], learning


def generic(arch: str) -> list[Method]:
    """Every tree of the generic bank, each as a static method."""
    bank = Bank.load(f"generic-{arch}")
    return [Method(f"static {t.name}", None, "static", t.name) for t in bank.trees if t.n_nodes > 1]
