"""What drafting did: one record per step, and the figures people ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from ..bank.acceptance import DRAFTERS, N_INPUTS

# struct entmtp_node
NODE_DTYPE = np.dtype(
    [
        ("token", "i4"),
        ("parent", "i4"),  # index of a node before it; -1: the root
        ("sources", "u4"),  # bits of abi.SOURCES; 0: the root, which nobody guessed
        ("p", "f4"),  # chance of being reached, as it was believed; -1: the policy does not say
        ("walked", "i4"),  # 1: the root, and guesses whose token was evaluated next
    ]
)

# struct entmtp_step
STEP_DTYPE = np.dtype(
    [
        ("entropy", "f4"),  # running estimate when the tree was chosen, nats
        ("tree", "i4"),  # index in the bank
        ("n_nodes", "i4"),  # tokens verified, the root among them
        ("n_accepted", "i4"),  # drafted tokens taken
        ("t_draft_us", "i4"),
        ("t_verify_us", "i4"),
        ("t_sample_us", "i4"),
        ("t_host_us", "i4"),
        ("n_by", "i4", (len(DRAFTERS),)),  # accepted tokens by drafter
    ]
)

# struct entmtp_proposal
PROPOSAL_DTYPE = np.dtype(
    [
        ("step", "i4"),
        ("sources", "u4"),  # bits of abi.SOURCES
        ("right", "i4"),
        ("p", "f4"),  # that it is right, as it was believed
        ("inputs", "f4", (N_INPUTS,)),  # as in bank/acceptance.py
    ]
)


@dataclass(frozen=True)
class Walk:
    """The tree of the last step, struct entmtp_walk.

    Attributes:
        n_past: tokens of the text before its root.
        nodes: see `NODE_DTYPE`, parents before children; none: no step was made since the last prompt.
        entropy: running mean, nats, of the distributions that tokens were drawn from so far.
    """

    n_past: int
    nodes: npt.NDArray[np.void]
    entropy: float


@dataclass
class OlderSteps:
    """Sums over the steps before those that have a record, struct entmtp_step_sums."""

    n_steps: int = 0
    n_nodes: int = 0
    n_accepted: int = 0
    entropy: float = 0.0
    t_draft_us: int = 0
    t_verify_us: int = 0
    t_sample_us: int = 0
    t_host_us: int = 0
    n_by: Sequence[int] = (0,) * len(DRAFTERS)
    by_tree: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(0, np.int64)
    )  # [n_trees + 1] steps


@dataclass(frozen=True)
class Traffic:
    """What crossed between host and device, struct entmtp_traffic. llama.cpp's own inputs of a pass (tokens, positions,
    attention mask) are not among it.

    Attributes:
        n_passes: passes of the model, prompts among them.
        n_outputs: tokens with outputs in them.
        to_host, to_device: bytes.
        on_device: bytes from one tensor to another of the same device.
        n_rows: rows of logits that the host read whole.
        n_syncs: times that the host waited.
        n_graphs: graphs of the model that were built or allocated anew.
        n_draft_graphs: graphs of the heads that were built.
    """

    n_passes: int = 0
    n_outputs: int = 0
    to_host: int = 0
    to_device: int = 0
    on_device: int = 0
    n_rows: int = 0
    n_syncs: int = 0
    n_graphs: int = 0
    n_draft_graphs: int = 0

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Outputs:
    """What is done with the logits of a pass: `mode` on `device`, and in `note` why it is not what was asked for."""

    mode: str = "host"
    device: str = ""
    note: str = ""

    def __str__(self) -> str:
        done = {
            "host": "every row of logits is copied to the host",
            "rows": "rows of logits stay where they are, visited ones are read",
            "device": "logits are reduced on the device",
        }
        return f"{self.device or 'CPU'}: {done[self.mode]}" + (f" ({self.note})" if self.note else "")


@dataclass
class DraftStats:
    """Statistics of the steps of a generation. The figures count all steps since the last reset.

    Attributes:
        steps: one record per step, see `STEP_DTYPE`, of the latest 65,536 steps.
        tree_names: names of the bank's trees, by index.
        older: sums over the steps before.
        traffic: what crossed between host and device.
        outputs: where logits are reduced.
        lossless: what the text is to plain decoding's, see `Llama.lossless`.
    """

    steps: npt.NDArray[np.void] = field(default_factory=lambda: np.zeros(0, STEP_DTYPE))
    tree_names: list[str] = field(default_factory=list)
    older: OlderSteps = field(default_factory=OlderSteps)
    traffic: Traffic = field(default_factory=Traffic)
    outputs: Outputs = field(default_factory=Outputs)
    lossless: str = "exact"

    @property
    def n_steps(self) -> int:
        return self.older.n_steps + len(self.steps)

    @property
    def n_drafted(self) -> int:
        """Guesses that were verified."""
        return self.older.n_nodes + int(self.steps["n_nodes"].sum()) - self.n_steps

    @property
    def n_accepted(self) -> int:
        """Guesses that were taken."""
        return self.older.n_accepted + int(self.steps["n_accepted"].sum())

    @property
    def accepted_by(self) -> dict[str, int]:
        """Guesses that were taken, by the drafter that proposed them; what several proposed counts for the first."""
        recent = self.steps["n_by"].sum(axis=0, dtype=np.int64)
        return {name: int(self.older.n_by[i] + recent[i]) for i, name in enumerate(DRAFTERS)}

    @property
    def tokens_per_step(self) -> float:
        """τ: tokens evaluated per pass of the base model; 1.0 is plain decoding."""
        return 1.0 + self.n_accepted / self.n_steps if self.n_steps else 0.0

    @property
    def acceptance(self) -> float:
        """Accepted share of the drafted tokens. A tree's branches exclude each other, so wide trees score low."""
        return self.n_accepted / self.n_drafted if self.n_drafted else 0.0

    @property
    def mean_entropy(self) -> float:
        """Mean of the running estimate, nats."""
        total = self.older.entropy + float(self.steps["entropy"].sum(dtype=np.float64))
        return total / self.n_steps if self.n_steps else 0.0

    @property
    def trees_used(self) -> dict[str, int]:
        """Steps per tree, most used first."""
        counts = np.bincount(self.steps["tree"], minlength=len(self.older.by_tree))
        counts[: len(self.older.by_tree)] += self.older.by_tree
        order = np.argsort(-counts, kind="stable")
        return {self.tree_names[i]: int(counts[i]) for i in order if counts[i]}

    @property
    def time_split(self) -> dict[str, float]:
        """Seconds in draft, verify, sample and host work."""
        return {
            k: (getattr(self.older, f"t_{k}_us") + float(self.steps[f"t_{k}_us"].sum())) / 1e6
            for k in ("draft", "verify", "sample", "host")
        }

    def __str__(self) -> str:
        used = ", ".join(f"{name} {count}" for name, count in self.trees_used.items())
        by = ", ".join(f"{n} from {name}" for name, n in self.accepted_by.items() if n)
        return (
            f"{self.tokens_per_step:.2f} tokens/step over {self.n_steps} steps, "
            f"{self.n_accepted} of {self.n_drafted} drafts accepted{f' ({by})' if by else ''}, "
            f"entropy {self.mean_entropy:.2f} nats, trees: {used or 'none'}"
        )
