"""What a step costs on one machine: measured once, kept with a bank or in the user's cache.

A pass over n tokens costs neither n passes nor one, and not even more for more tokens (kernels like some sizes
better), so
everything here is measured: passes by size at several context depths, drafts by depth and width, and what is left of a
step. Sizes are interleaved, so that a drift of the machine hits them all.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .atomic import atomic_path
from .bank import PLAIN, Bank, Tree
from .cache import cache_folder
from .errors import BankError

if TYPE_CHECKING:
    from .llama import Llama

N_VERIFY = 64  # passes are tabulated up to this many tokens
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
QUICK_SIZES = (1, 2, 4, 3, 8, 6, 5, 16, 7, 12, 10, 24, 32, 64)  # most telling first
CHECK_SIZES = QUICK_SIZES[:5]
WIDTHS = (1, 2, 4)
PAD = 256  # cache rows that attention reads come in multiples of this

Progress = Callable[[str, int, int], None]  # stage, done, total


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
        context: depth that decisions are made for.
        spread: median over the sizes of half the distance between the quartiles, relative to the median.
        key: what was measured, see `machine_key`; None for costs of another machine.
    """

    verify: dict[int, dict[int, float]]
    chain: tuple[float, ...]
    level: tuple[tuple[float, ...], ...]
    sample: float = 0.0
    host: float = 0.0
    token: float = 0.0
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
        """The same from the number of expanded paths on each level."""
        total = self.chain[len(widths)]
        for width, us in zip(widths, self.level, strict=False):
            if width > 4:
                total += us[2] - us[0] + (width - 4) * max(us[2] - us[1], 0.0) / 2
            else:
                total += float(np.interp(width, WIDTHS, us)) - us[0]
        return total

    def step(self, tree: Tree, context: int | None = None) -> float:
        """Verify and draft of a step with `tree`; larger trees than N_VERIFY in proportion."""
        curve = self.curve(context)
        verify = curve[min(tree.n_nodes, N_VERIFY) - 1] * max(1.0, tree.n_nodes / N_VERIFY)
        return float(verify) + self.draft(tree)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data |= {"chain": list(self.chain), "level": [list(row) for row in self.level]}
        data["verify"] = {str(d): {str(n): us for n, us in row.items()} for d, row in self.verify.items()}
        return {k: v for k, v in data.items() if v is not None}


def relative(verify: dict[int, float], chain: Sequence[float]) -> Costs:
    """Costs from figures relative to a pass of one token, as published curves give them; a unit is a millisecond."""
    us = [1e3 * c for c in chain]
    level = tuple((b - a, b - a, b - a) for a, b in pairwise(us))
    return Costs({0: {n: 1e3 * c for n, c in verify.items()}}, tuple(us), level)


@dataclass
class _Timings:
    """Times of one kind of step, by what was timed."""

    us: dict[Any, list[float]] = field(default_factory=dict)

    def add(self, key: Any, value: float) -> None:
        self.us.setdefault(key, []).append(value)

    def median(self, key: Any) -> float:
        return float(np.median(self.us[key]))

    def spread(self) -> float:
        rows = [np.percentile(v, [25, 50, 75]) for v in self.us.values() if len(v) > 2]
        return float(np.median([(high - low) / 2 / mid for low, mid, high in rows])) if rows else 0.0


def measure(
    llm: Llama,
    sizes: Sequence[int] = SIZES,
    contexts: Sequence[int] = (64, 512),
    n_rounds: int = 12,
    budget: float | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Costs:
    """Time passes, drafts and the rest on this machine. `llm` must have heads; its context is overwritten.

    Args:
        sizes: tokens in a pass.
        contexts: context depths.
        n_rounds: every size is timed twice in each round.
        budget: seconds after which nothing new is started (at most `n_rounds` rounds); sizes that were not reached are
            interpolated, and chains are taken for the sum of their heads.
    """
    assert llm._heads is not None and llm._decoder is not None
    dec, heads = llm._decoder, llm._heads
    n_heads = heads.n_heads
    room = min(llm.n_ctx(), llm.n_batch) - 1
    sizes = [n for n in sizes if n <= room]
    contexts = sorted({min(c, llm.n_ctx() - max(sizes) - 8) for c in contexts})
    start = time.perf_counter()

    def over() -> bool:
        return budget is not None and time.perf_counter() - start > budget

    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, llm.n_vocab(), max(contexts) + 8).tolist()
    wide = {n: Tree.from_paths(f"w{n}", [[r] for r in range(n - 1)]) for n in sizes if n > 1}
    deep = {d: Tree.from_paths(f"d{d}", [[0] * (i + 1) for i in range(d)]) for d in range(1, n_heads + 1)}
    bank = Bank("costs", (PLAIN, *wide.values(), *deep.values()))
    dec.set_trees(bank)
    verify, chain = _Timings(), _Timings()

    def steps(tree: Tree, n: int, depth: int) -> None:
        """n steps with one tree: the first builds its graph, the others are timed."""
        dec.set_policy(bank, "static", bank.index(tree.name))
        llm.reset_draft_stats()
        for i in range(n):
            dec.eval([int(rng.integers(llm.n_vocab()))], depth + i)
        for s in llm.draft_stats.steps[1:]:
            verify.add((depth, int(s["n_nodes"])), float(s["t_verify_us"]))
            if tree.name.startswith("d"):
                chain.add(tree.max_depth, float(s["t_draft_us"]))

    todo = [PLAIN if n == 1 else wide[n] for n in sizes]
    if budget is None:
        todo += deep.values()
    n_steps = 3 if budget is None else 2
    total = len(contexts) * n_rounds * len(todo)
    done = 0
    for depth in contexts:
        dec.set_policy(bank, "off")
        llm.reset()
        llm.eval(prompt[:depth])
        for _ in range(n_rounds):
            for tree in todo:
                if over() and all((depth, n) in verify.us for n in (1, 2)):
                    break
                dec.eval([prompt[depth - 1]], depth - 1)  # back to this depth
                steps(tree, n_steps, depth)
                done += 1
                if progress:
                    progress("costs of passes", done, total)

    level = _Timings()
    h = dec.hidden()
    n_level_rounds = 4 * n_rounds
    for i in range(n_level_rounds + 1):
        for head in range(n_heads):
            for w in WIDTHS if heads.info.grounded else (1,):
                paths = rng.integers(0, llm.n_vocab(), (w, head + 1))
                begin = time.perf_counter()
                heads.expand(head, h, paths, 8)
                if i > 0:  # the first builds the graph
                    level.add((head, w), (time.perf_counter() - begin) * 1e6)
        if i > 0 and over():
            break
    llm.reset()
    llm.reset_draft_stats()

    verify_us = {
        d: {n: round(verify.median((d, n)), 1) for n in sizes if (d, n) in verify.us} for d in contexts
    }
    if budget is None:
        chain_us = [0.0] + [chain.median(d) for d in deep]
    else:
        chain_us = [0.0, *np.cumsum([level.median((head, 1)) for head in range(n_heads)])]
    rows = tuple(
        tuple(round(level.median((head, w if heads.info.grounded else 1)), 1) for w in WIDTHS)
        for head in range(n_heads)
    )
    return Costs(
        verify={d: row for d, row in verify_us.items() if row},
        chain=tuple(round(float(us), 1) for us in np.maximum.accumulate(chain_us)),
        level=rows,
        spread=round(verify.spread(), 3),
        context=contexts[0],
        key=machine_key(llm),
    )


#
# the user's cache
#


def machine_key(llm: Llama) -> str:
    """Digest of all that costs depend on: model, heads, build, device, threads and the context's settings."""
    from . import _lib, kernels
    from .machine import cpu_name

    assert llm._heads is not None

    def file_identity(path: str | Path) -> list[Any]:
        # not the name or the date: the same file elsewhere costs the same
        n, size = 1 << 18, Path(path).stat().st_size
        with open(path, "rb") as file:
            ends = file.read(n)
            file.seek(max(size - n, 0))
            ends += file.read(n)
        return [size, hashlib.sha256(ends).hexdigest()]

    build = _lib.library_folder() / "build-info.json"
    p = llm.context_params
    facts = [
        file_identity(llm.model_path), file_identity(llm.heads_path or ""), build.read_text() if build.exists() else "",
        cpu_name(), llm._heads.info.device.decode(), llm.n_threads, llm.n_threads_batch,
        llm.model_params.n_gpu_layers, p.flash_attn_type, p.type_k, p.type_v, p.n_ubatch, p.offload_kqv,
        kernels.current(),
    ]  # fmt: skip
    if llm.rpc_servers:
        facts += [llm.rpc_servers, llm.tensor_split]
    outputs = llm._decoder.outputs.mode if llm._decoder else "host"
    if outputs != "host":
        facts.append(outputs)
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:20]


def tuned_path(key: str | None) -> Path:
    """Where python -m entmtp.tune leaves the bank that Llama uses for a model, its heads and this machine."""
    return cache_folder() / "banks" / f"{key}.json"


def cached(llm: Llama) -> Costs | None:
    """Costs measured before for this very model, machine and build; None if there are none, or the file is broken."""
    path = cache_folder() / "costs" / f"{machine_key(llm)}.json"
    try:
        return from_json(json.loads(path.read_text("utf-8")), str(path))
    except (OSError, ValueError, BankError):
        return None


def keep(costs: Costs) -> None:
    """Put costs in the cache. A cache that cannot be written to is no reason to fail."""
    folder = cache_folder() / "costs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / f"{costs.key}.json") as temporary:
            temporary.write_text(json.dumps(costs.to_json()), "utf-8")
    except OSError:
        return


def quick(llm: Llama, seconds: float = 1.5, tuned: Costs | None = None) -> Costs:
    """Costs of this machine: tuned, or cached, if a short look finds them still possible; else measured.

    Measuring takes about `seconds`; what it finds is cached if it can be trusted.
    """
    for known in (tuned, cached(llm)):
        if known is not None and not were_disturbed(llm, known):
            return known
    own = measure(llm, QUICK_SIZES, contexts=(16,), n_rounds=8, budget=seconds)
    if is_steady(own):
        keep(own)
    return own


def were_disturbed(llm: Llama, known: Costs) -> bool:
    """Whether passes or drafts are much faster now than these costs of before: then another program had the cores.

    That they are slower says nothing: another program has the cores now, and the decoder follows that as it goes.
    """
    depth = min(known.verify)
    now = measure(llm, CHECK_SIZES, contexts=(depth,), n_rounds=3, budget=0.1)
    (seen,) = now.verify.values()
    passes = any(us * 1.3 < known.verify[depth].get(n, 0.0) for n, us in seen.items())
    return passes or now.chain[-1] * 1.5 < known.chain[-1]


def is_steady(costs: Costs) -> bool:
    """Whether timings are good enough to be kept: another program on the same cores can make them absurd."""
    possible = all(us <= 3 * n * row[1] for row in costs.verify.values() for n, us in row.items())
    return possible and costs.spread <= 0.5


def from_json(data: Any, label: str) -> Costs:
    """Costs from parsed JSON.

    Raises:
        BankError: names the field that is wrong.
    """
    from .fields import Fields

    f = Fields(data, label, "costs")
    f.only(set(Costs.__dataclass_fields__))
    raw = f.data.get("verify")
    if not isinstance(raw, dict) or not raw:
        raise f.fail("verify", "an object from context depths to costs")
    verify: dict[int, dict[int, float]] = {}
    for depth, row in raw.items():
        if not depth.isdecimal() or int(depth) > 1 << 24:
            raise f.fail("verify", "an object from context depths to costs")
        if (
            not isinstance(row, dict)
            or "1" not in row
            or not all(k.isdecimal() and 0 < int(k) <= 512 for k in row)
        ):
            raise f.fail(f"verify.{depth}", "an object from numbers of tokens, 1 among them, to microseconds")
        verify[int(depth)] = {int(n): f.number(f"verify.{depth}.{n}", us, 1e-6) for n, us in row.items()}
    chain = f.numbers("chain", f.data.get("chain"), 0.0)
    if not chain or chain[0] != 0.0 or len(chain) > 65:
        raise f.fail("chain", "a list of up to 64 draft costs by depth, 0 first")
    rows = f.data.get("level")
    if not isinstance(rows, list) or len(rows) != len(chain) - 1:
        raise f.fail("level", f"a list of {len(chain) - 1} heads' costs")
    return Costs(
        verify=verify,
        chain=chain,
        level=tuple(f.numbers(f"level[{i}]", row, 0.0, n=3) for i, row in enumerate(rows)),
        **{k: f.number(k, f.data.get(k, 0.0), 0.0) for k in ("sample", "host", "token", "spread")},
        context=int(f.number("context", f.data.get("context", 256), 0.0)),
        key=f.text("key"),
    )
