"""What drafting did: one record per step, and the figures people ask for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

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
    ]
)


@dataclass
class DraftStats:
    """Statistics of the steps of a generation.

    Attributes:
        steps: one record per step, see `STEP_DTYPE`.
        tree_names: names of the bank's trees, by index.
    """

    steps: npt.NDArray[np.void] = field(default_factory=lambda: np.zeros(0, STEP_DTYPE))
    tree_names: list[str] = field(default_factory=list)

    @property
    def n_steps(self) -> int:
        return len(self.steps)

    @property
    def n_drafted(self) -> int:
        """Guesses that were verified."""
        return int((self.steps["n_nodes"] - 1).sum())

    @property
    def n_accepted(self) -> int:
        """Guesses that were taken."""
        return int(self.steps["n_accepted"].sum())

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
        return float(self.steps["entropy"].mean()) if self.n_steps else 0.0

    @property
    def trees_used(self) -> dict[str, int]:
        """Steps per tree, most used first."""
        ids, counts = np.unique(self.steps["tree"], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {self.tree_names[ids[i]]: int(counts[i]) for i in order}

    @property
    def time_split(self) -> dict[str, float]:
        """Seconds in draft, verify, sample and host work."""
        return {k: float(self.steps[f"t_{k}_us"].sum()) / 1e6 for k in ("draft", "verify", "sample", "host")}

    def __str__(self) -> str:
        used = ", ".join(f"{name} {count}" for name, count in self.trees_used.items())
        return (
            f"{self.tokens_per_step:.2f} tokens/step over {self.n_steps} steps, "
            f"{self.n_accepted} of {self.n_drafted} drafts accepted, "
            f"entropy {self.mean_entropy:.2f} nats, trees: {used or 'none'}"
        )
