"""What a step costs on one machine, as a table: kept with a bank or in the user's cache.

A pass over n tokens costs neither n passes nor one, and not even more for more tokens (kernels like some sizes
better); measure/timing.py fills the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.errors import BankError
from ..common.fields import Fields
from .tree import Tree

N_VERIFY = 64  # passes are tabulated up to this many tokens
WIDTHS = (1, 2, 4)
DEEPEST = 1 << 24  # context, tokens
MOST = 1e12  # us, eleven days: what is beyond is no time, and sums with it would be no numbers
PAD = 256  # cache rows that attention reads come in multiples of this


@dataclass(frozen=True)
class Costs:
    """Costs in microseconds.

    Attributes:
        verify: median time of a pass, {context depth: {tokens: us}}.
        chain: draft of a chain by depth, in one graph. [n_heads + 1], 0 for depth 0
        level: one head alone, after 1, 2 and 4 paths. [n_heads][3]
        sample: sampling one token, through the sampler chain the costs were measured with.
        host: what else a step costs in the decoder.
        token: what else a token costs its caller, in Python.
        build: what the first passes of a size take longer than later ones, in all, where a device builds graphs; 0 on a
            CPU, where that is little.
        context: depth that decisions are made for.
        spread: median over the sizes of half the distance between the quartiles, relative to the median.
        key: what was measured (`machine_key` of measure/known.py); None for costs of another machine.
    """

    verify: dict[int, dict[int, float]]
    chain: tuple[float, ...]
    level: tuple[tuple[float, ...], ...]
    sample: float = 0.0
    host: float = 0.0
    token: float = 0.0
    build: float = 0.0
    context: int = 256
    spread: float = 0.0
    key: str | None = None

    def curve(self, context: int | None = None) -> npt.NDArray[np.float64]:
        """Cost of a pass over 1 to N_VERIFY tokens at a context depth, [N_VERIFY]; linear between what was measured."""
        at = self.context if context is None else context
        depths = sorted(self.verify)
        rows = []
        for d in depths:
            sizes = sorted(self.verify[d])
            us = [self.verify[d][n] for n in sizes]
            row = np.interp(np.arange(1, N_VERIFY + 1), sizes, us)
            if len(sizes) > 1 and sizes[-1] < N_VERIFY:  # beyond the last size: on with the last slope
                slope = max((us[-1] - us[-2]) / (sizes[-1] - sizes[-2]), 0.0)
                row[sizes[-1] :] = us[-1] + slope * (np.arange(sizes[-1] + 1, N_VERIFY + 1) - sizes[-1])
            rows.append(row)
        if len(rows) == 1:
            return np.asarray(rows[0])
        # on a line through the two depths around, beyond the last one too: attention costs in proportion to the
        # cache rows it reads, which llama.cpp rounds up to a multiple of PAD
        read = [PAD * -(-(d + 4) // PAD) for d in depths]
        x = at + PAD / 2  # what is read at about this depth, on average
        i = int(np.clip(np.searchsorted(read, x) - 1, 0, len(depths) - 2))
        t = max((x - read[i]) / max(read[i + 1] - read[i], 1), 0.0)
        return np.maximum(rows[i] + t * (rows[i + 1] - rows[i]), 1e-3)

    def draft(self, tree: Tree) -> float:
        """Draft of a tree in one graph: the chain of its depth, and what its levels' widths add."""
        if tree.max_depth == 0:
            return 0.0
        if tree.max_depth >= len(self.chain):
            raise BankError(
                f"tree {tree.name} is {tree.max_depth} deep, but only {len(self.chain) - 1} heads were timed"
            )
        parents = {p[:-1] for p in tree.paths}
        return self.draft_of_widths(tuple(sum(len(p) == d for p in parents) for d in range(tree.max_depth)))

    def draft_of_widths(self, widths: tuple[int, ...]) -> float:
        """The same from the number of expanded paths on each level. Wider is not cheaper, whatever was timed."""
        total = self.chain[len(widths)]
        for width, us in zip(widths, self.level, strict=False):
            if width > 4:
                more = us[2] - us[0] + (width - 4) * max(us[2] - us[1], 0.0) / 2
            else:
                more = float(np.interp(width, WIDTHS, us)) - us[0]
            total += max(more, 0.0)
        return total

    def step(self, tree: Tree, context: int | None = None) -> float:
        """Verify and draft of a step with `tree`; larger trees than N_VERIFY in proportion."""
        curve = self.curve(context)
        verify = curve[min(tree.n_nodes, N_VERIFY) - 1] * max(1.0, tree.n_nodes / N_VERIFY)
        return float(verify) + self.draft(tree)

    def scaled(self, factor: float) -> Costs:
        """All of it times a factor, as costs of no known machine."""
        return Costs(
            verify={d: {n: us * factor for n, us in row.items()} for d, row in self.verify.items()},
            chain=tuple(us * factor for us in self.chain),
            level=tuple(tuple(us * factor for us in row) for row in self.level),
            sample=self.sample, host=self.host, token=self.token, build=self.build * factor, context=self.context,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data |= {"chain": list(self.chain), "level": [list(row) for row in self.level]}
        data["verify"] = {str(d): {str(n): us for n, us in row.items()} for d, row in self.verify.items()}
        return {k: v for k, v in data.items() if v is not None and (k != "build" or v)}


def relative(verify: dict[int, float], chain: Sequence[float]) -> Costs:
    """Costs from figures relative to a pass of one token, as published curves give them; a unit is a millisecond."""
    us = [1e3 * c for c in chain]
    level = tuple((b - a, b - a, b - a) for a, b in pairwise(us))
    return Costs({0: {n: 1e3 * c for n, c in verify.items()}}, tuple(us), level)


def _whole(text: str) -> int:
    """The number that a few digits stand for, -1 for all else."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 8 else -1


def from_json(data: Any, label: str) -> Costs:
    """Costs from parsed JSON.

    Raises:
        BankError: names the field that is wrong.
    """
    f = Fields(data, label, "costs")
    f.only(set(Costs.__dataclass_fields__))
    raw = f.data.get("verify")
    if not isinstance(raw, dict) or not raw:
        raise f.fail("verify", "an object from context depths to costs")
    verify: dict[int, dict[int, float]] = {}
    for depth, row in raw.items():
        if not 0 <= _whole(depth) <= DEEPEST:
            raise f.fail("verify", "an object from context depths to costs")
        if not isinstance(row, dict) or "1" not in row or not all(0 < _whole(k) <= 512 for k in row):
            raise f.fail(f"verify.{depth}", "an object from numbers of tokens, 1 among them, to microseconds")
        verify[int(depth)] = {
            int(n): f.number(f"verify.{depth}.{n}", us, 1e-6, MOST) for n, us in row.items()
        }
    chain = f.numbers("chain", f.data.get("chain"), 0.0, MOST)
    if not chain or chain[0] != 0.0 or len(chain) > 65:
        raise f.fail("chain", "a list of up to 64 draft costs by depth, 0 first")
    rows = f.data.get("level")
    if not isinstance(rows, list) or len(rows) != len(chain) - 1:
        raise f.fail("level", f"a list of {len(chain) - 1} heads' costs")
    return Costs(
        verify=verify,
        chain=chain,
        level=tuple(f.numbers(f"level[{i}]", row, 0.0, MOST, n=3) for i, row in enumerate(rows)),
        **{
            k: f.number(k, f.data.get(k, 0.0), 0.0, MOST)
            for k in ("sample", "host", "token", "build", "spread")
        },
        context=int(f.number("context", f.data.get("context", 256), 0.0, DEEPEST)),
        key=f.text("key"),
    )
