"""What it will cost to draft with heads on this machine, measured before there are any.

Heads of random weights that are projections alone are loaded and run between passes of the base model, as drafts are,
so that the weights have to come from memory. Two sizes of each kind give what a row of a projection costs; the blocks
of a head are priced as rows, too, since a row is a row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from ..bank.costs import Costs
from ..convert.layout import Heads as HeadsFile
from ..convert.writer import Origin, write_heads
from ..measure.at_load import quick
from ..models.base import BaseModel
from ..models.formats.tensors import Rows, SourceTensor, Storage
from ..native.heads import Heads
from .base import Base
from .eagle3 import Layer
from .heads import Shape

LM_HEADS = ("own", "shared", "base")
MOST_ROWS = 8192
MOST_NUMBERS = 1 << 22  # of the larger of the two projections
SECONDS = 3.0
LEAST, MOST = 3, 24  # times that each is run
K = 8  # guesses that are looked for


@dataclass(frozen=True)
class Prices:
    """Microseconds.

    Attributes:
        costs: of passes, by size.
        fixed: what running a head costs whatever its size, by kind of projection: [n_heads] each.
        row: what a row of its projection adds, alike.
    """

    costs: Costs
    fixed: dict[str, npt.NDArray[np.float64]]
    row: dict[str, npt.NDArray[np.float64]]

    def head(self, lm_head: str, head: int, n_rows: int, n_block_rows: int = 0) -> float:
        """Of running one head with a projection of so many rows, and blocks of as many numbers as so many rows."""
        blocks = float(np.mean(self.row["own"])) * n_block_rows  # these are always the heads' own
        return float(self.fixed[lm_head][head] + self.row[lm_head][head] * n_rows) + blocks


def measure_prices(
    base: Base,
    facts: BaseModel,
    shape: Shape | Layer,
    outtype: str,
    lm_heads: Sequence[str],
    seconds: float = SECONDS,
) -> Prices:
    """Time heads of random weights on the base model's device.

    Args:
        shape: of the heads to come; their number counts.
        outtype: of their file.
        lm_heads: kinds of projections; "own" is always among what is timed.
    """
    large = max(2, min(MOST_ROWS, MOST_NUMBERS // shape.n_embd, facts.n_vocab))
    sizes = (large // 8 or 1, large)
    kinds = [kind for kind in LM_HEADS if kind in lm_heads or kind == "own"]
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=shape.n_embd).astype(np.float32)
    times: dict[tuple[str, int], list[list[float]]] = {(kind, n): [] for kind in kinds for n in sizes}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        probes = {
            (kind, n): stack.enter_context(
                closing(_probe(Path(folder), base, facts, shape.n_heads, outtype, kind, n))
            )
            for kind, n in times
        }
        with base.llm.still():
            costs = quick(base.llm)
        begin = time.perf_counter()
        for i in range(MOST + 1):
            for key, heads in probes.items():
                base.forget(0)
                base.eval([int(rng.integers(base.n_vocab))], [0], [0])
                took = []
                for head in range(shape.n_heads):
                    path = rng.integers(0, base.n_vocab, (1, head + 1))
                    start = time.perf_counter()
                    heads.expand(head, hidden, path, min(K, key[1]))
                    took.append((time.perf_counter() - start) * 1e6)
                if i > 0:  # graphs are new in the first round
                    times[key].append(took)
            if i >= LEAST and time.perf_counter() - begin > seconds:
                break
        base.forget(0)
    us = {key: np.median(np.array(rows), axis=0) for key, rows in times.items()}
    row = {
        kind: np.maximum(us[kind, sizes[1]] - us[kind, sizes[0]], 0.0) / (sizes[1] - sizes[0])
        for kind in kinds
    }
    fixed = {kind: np.maximum(us[kind, sizes[0]] - row[kind] * sizes[0], 0.0) for kind in kinds}
    return Prices(costs, fixed, row)


def _probe(
    folder: Path, base: Base, facts: BaseModel, n_heads: int, outtype: str, lm_head: str, n_rows: int
) -> Heads:
    """Heads of random weights, and of projections alone."""
    d = facts.n_embd
    # row i of a matrix is numbers i to i + n_embd of one list
    pool = (np.random.default_rng(1).normal(size=n_rows + d) / np.sqrt(d)).astype("<f2")
    path = folder / "numbers"
    path.write_bytes(pool.tobytes())
    storage = Storage(path, path.name, 0, pool.nbytes)
    names = {
        "own": [f"head.{i}.output.weight" for i in range(n_heads)],
        "shared": ["output.weight"],
        "base": [],
    }
    tensors: list[tuple[str, SourceTensor | Rows]] = [
        (name, SourceTensor(name, "float16", (n_rows, d), (1, 1), 0, 2, storage)) for name in names[lm_head]
    ]
    vocab = None if n_rows == facts.n_vocab else np.arange(n_rows, dtype=np.int64)
    heads = HeadsFile(
        "medusa", n_heads, 0, tensors=tensors, draft_vocab=vocab, shared_output=lm_head == "base"
    )
    outfile = folder / "probe.gguf"
    write_heads(
        outfile, heads, Origin("probe", None, None), facts, facts.outtype if outtype == "auto" else outtype
    )
    return Heads(outfile, base.llm.model, base.llm.n_threads)
