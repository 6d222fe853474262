"""A machine whose clock stands still but for what is computed: what its passes and drafts take is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from entmtp.bank import PLAIN, Bank, Tree
from entmtp.native.stats import STEP_DTYPE, DraftStats


class Machine:
    """What `entmtp.measure.timing` measures (a `Subject`), with a clock of its own: `perf_counter`, seconds.

    Args:
        passes: microseconds of a pass, by context depth and tokens.
        chains: of a draft, by depth.
        levels: of one head alone, by its number and its paths.
        builds: what the first passes of a size take longer, each in its turn; the first with another tree always does.
        grounded: whether the heads' time depends on the paths.
    """

    def __init__(
        self, passes: Callable[[int, int], float], chains: Callable[[int], float] = lambda depth: 0.0,
        levels: Callable[[int, int], float] = lambda head, width: 0.0, builds: Sequence[float] = (),
        n_heads: int = 0, n_ctx: int = 512, n_batch: int = 512, grounded: bool = True, n_gpu_layers: int = 0,
    ):  # fmt: skip
        self.passes, self.chains, self.levels, self.builds = passes, chains, levels, builds
        self.us = 0.0
        self.n_batch, self.size = n_batch, n_ctx
        self.heads_path = "heads.gguf" if n_heads else None
        self.draft_heads = SimpleNamespace(
            n_heads=n_heads, info=SimpleNamespace(grounded=grounded), expand=self.expand
        )
        self.model_params, self.rpc_servers = SimpleNamespace(n_gpu_layers=n_gpu_layers), list[str]()
        self.decoder, self.ctx, self.trees = self, None, True
        self.bank, self.tree = Bank("none", (PLAIN,)), PLAIN
        # nodes; µs of draft, verify, sample and host
        self.steps: list[tuple[int, float, float, float, float]] = []
        self.n_passes: dict[tuple[int, int], int] = {}  # with a tree, by depth and nodes
        self.evaluated: list[tuple[int, int]] = []  # depth and tokens of every pass
        self.is_new = False  # the tree has no graph yet
        self.depth: int | None = None  # of the text, at which a tree is timed
        self.is_warm = False  # a generation was made
        self.tree_policy, self.asked = "", list[dict[str, Any]]()

    # the clock

    def perf_counter(self) -> float:
        return self.us / 1e6

    # the model

    def n_ctx(self) -> int:
        return self.size

    def n_vocab(self) -> int:
        return 100

    def tokenize(self, text: bytes) -> list[int]:
        return list(range(9))

    def reset(self) -> None:
        self.depth = None

    def reset_draft_stats(self) -> None:
        self.steps = []

    @property
    def draft_stats(self) -> DraftStats:
        steps = np.zeros(len(self.steps), STEP_DTYPE)
        for record, (n, draft, verify, sample, host) in zip(steps, self.steps, strict=True):
            record["n_nodes"], record["t_draft_us"], record["t_verify_us"] = n, draft, verify
            record["t_sample_us"], record["t_host_us"] = sample, host
        return DraftStats(steps)

    def generate(self, prompt: Sequence[int], **sampling: Any) -> Iterator[int]:
        """Tokens without end, each 500 µs in the decoder and 20 for its caller, who takes 5000 more in the first."""
        self.us += 9000.0
        extra, self.is_warm = 0.0 if self.is_warm else 5000.0, True
        while True:
            yield 1
            self.us += 520.0 + extra
            self.steps.append((1, 0.0, 400.0, 70.0, 30.0))
            self.asked.append(sampling)

    # the decoder

    def can_tree(self) -> bool:
        return self.trees

    def set_trees(self, bank: Bank, policy: str = "off") -> None:
        self.bank, self.tree_policy = bank, policy

    def set_policy(self, bank: Bank, policy: str, tree: int = 0) -> None:
        self.tree, self.is_new = (bank.trees[tree] if policy == "static" else PLAIN), True

    def hidden(self) -> Any:
        return None

    def eval(self, tokens: Sequence[int], at: int = 0, all_outputs: bool = False) -> None:
        n = len(tokens)
        self.evaluated.append((at, n))
        if not self.trees or n > 1:
            done = self.n_passes.get((0, n), 0)
            self.us += self.passes(at, n) + (self.builds[done] if done < len(self.builds) else 0.0)
            self.n_passes[0, n] = done + 1
            return
        self.step(at, self.tree)

    def step(self, at: int, tree: Tree) -> None:
        """A pass over one token and its tree. All steps at a depth take as long as the first."""
        if self.is_new:
            self.depth = at
        assert self.depth is not None
        draft = self.chains(tree.max_depth) if tree.name.startswith("d") else 0.0
        key = self.depth, tree.n_nodes
        verify = self.passes(*key)
        if tree.n_nodes > 1:
            done = self.n_passes.get(key, 0)
            verify += self.builds[done] if done < len(self.builds) else verify if self.is_new else 0.0
            self.n_passes[key] = done + 1
        self.is_new = False
        self.us += draft + verify
        self.steps.append((tree.n_nodes, draft, verify, 0.0, 0.0))

    # the heads

    def expand(self, head: int, hidden: Any, paths: Any, n: int) -> None:
        self.us += self.levels(head, len(paths))
