"""What a step costs on this machine: passes by size at several context depths, drafts by depth and width, the rest.

A pass over n tokens costs neither n passes nor one, and not even more for more tokens (kernels like some sizes
better), so everything here is measured. Sizes are interleaved, so that a drift of the machine hits them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import llama_cpp
import numpy as np

from ..bank import PLAIN, Bank, Costs, Tree
from ..bank.costs import WIDTHS
from .known import machine_key
from .subject import Subject

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
DEVICE_SIZES = (1, 2, 4, 8, 16, 32, 64)  # the only ones that grown trees are run in there
UNTIMED = 4  # steps with a tree on a device before its graph is as fast as it gets
N_BUILD = 2  # of them: those that build and capture the graph

Progress = Callable[[str, int, int], None]  # stage, done, total


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
    llm: Subject,
    sizes: Sequence[int] = SIZES,
    contexts: Sequence[int] = (64, 512),
    n_rounds: int = 12,
    budget: float | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Costs:
    """Time passes, drafts and the rest on this machine. `llm` may have heads; its context is overwritten.

    Args:
        sizes: tokens in a pass.
        contexts: context depths.
        n_rounds: every size is timed twice in each round.
        budget: seconds after which nothing new is started (at most `n_rounds` rounds); sizes that were not reached are
            interpolated, and chains are taken for the sum of their heads.
    """
    if not llm.decoder.can_tree():
        return measure_chains(llm, n_rounds, budget, seed)
    dec, heads = llm.decoder, llm.draft_heads if llm.heads_path else None
    n_heads = heads.n_heads if heads else 0
    room = min(llm.n_ctx() - 8, llm.n_batch) - 1  # behind a token, and with eight steps of it behind it
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
    first: dict[tuple[int, int], float] = {}  # us of the passes that build and capture, by context and size

    # the first step with a tree builds its graph; CUDA runs a graph twice before it captures it, in many milliseconds
    untimed = UNTIMED if on_device(llm) else 1

    def steps(tree: Tree, n: int, depth: int) -> None:
        """n timed steps with one tree."""
        dec.set_policy(bank, "static", bank.index(tree.name))
        llm.reset_draft_stats()
        for i in range(untimed + n):
            dec.eval([int(rng.integers(llm.n_vocab()))], depth + i)
        done = llm.draft_stats.steps
        key = depth, int(done[0]["n_nodes"])
        if key not in verify.us:
            first[key] = sum(float(s["t_verify_us"]) for s in done[:N_BUILD])
        for s in done[untimed:]:
            verify.add((depth, int(s["n_nodes"])), float(s["t_verify_us"]))
            if tree.name.startswith("d"):
                chain.add(tree.max_depth, float(s["t_draft_us"]))

    todo = [PLAIN if n == 1 else wide[n] for n in sizes]
    if budget is None:
        todo += deep.values()
    n_steps = 2 if budget is None else 1
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
    widths = WIDTHS if heads and heads.info.grounded else (1,)
    n_level_rounds = 4 * n_rounds if heads else 0
    for i in range(n_level_rounds + 1):
        for head in range(n_heads):
            assert heads is not None
            h = dec.hidden()
            for w in widths:
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
    timed = {key: (us, verify.median(key)) for key, us in first.items() if key in verify.us}
    extra = [(us - N_BUILD * usual, usual) for us, usual in timed.values()]
    builds = [us for us, usual in extra if us > usual / 2]  # others had their graph from before
    rows = tuple(
        tuple(round(level.median((head, w if w in widths else 1)), 1) for w in WIDTHS)
        for head in range(n_heads)
    )
    return Costs(
        verify={d: row for d, row in verify_us.items() if row},
        chain=tuple(round(float(us), 1) for us in np.maximum.accumulate(chain_us)),
        level=rows,
        spread=round(verify.spread(), 3),
        context=contexts[0],
        build=round(float(np.median(builds)), 1) if builds and on_device(llm) else 0.0,
        key=machine_key(llm),
    )


def on_device(llm: Subject) -> bool:
    """Whether layers are computed elsewhere than on this CPU: there graphs are built, and captured, for each size."""
    return bool(llm.model_params.n_gpu_layers or llm.rpc_servers)


def measure_chains(llm: Subject, n_rounds: int, budget: float | None, seed: int = 0) -> Costs:
    """The same where the memory holds no trees: passes over a few tokens in a row, as many as it can be cut back by."""
    dec, start = llm.decoder, time.perf_counter()
    sizes = range(1, 2 + llama_cpp.llama_n_rs_seq(llm.ctx))
    rng = np.random.default_rng(seed)
    depth, verify = min(16, llm.n_batch), _Timings()

    def run(n: int, at: int) -> float:
        tokens = rng.integers(0, llm.n_vocab(), n).tolist()
        begin = time.perf_counter()
        dec.eval(tokens, at, all_outputs=n > 1)
        return (time.perf_counter() - begin) * 1e6

    for i in range(n_rounds + 1):
        llm.reset()
        run(depth, 0)
        at = depth
        for n in sizes:
            if at + n > llm.n_ctx():
                break
            us = run(n, at)
            at += n
            if i > 0:  # graphs are new in the first round
                verify.add(n, us)
        if i > 1 and budget is not None and time.perf_counter() - start > budget:
            break
    llm.reset()
    llm.reset_draft_stats()
    return Costs(
        verify={depth: {n: round(verify.median(n), 1) for n in sizes if n in verify.us}},
        chain=(0.0,), level=(), spread=round(verify.spread(), 3), context=depth, key=machine_key(llm),
    )  # fmt: skip


def measure_rest(llm: Subject, costs: Costs, n_tokens: int = 96, **sampling: Any) -> Costs:
    """Fill in what a token costs besides draft and verify: sampling, decoder and caller, from a plain rollout."""
    llm.set_trees(Bank("plain", (PLAIN,)), policy="off")
    prompt = llm.tokenize(b"The quick brown fox jumps over the lazy dog.")
    for _ in range(2):  # the first one warms up
        llm.reset()
        llm.reset_draft_stats()
        n, begin = 0, 0.0
        for _token in llm.generate(prompt, **sampling):
            begin = begin or time.perf_counter()
            n += 1
            if n == n_tokens:
                break
        wall = (time.perf_counter() - begin) * 1e6
    steps = llm.draft_stats.steps
    inside = sum(float(steps[f"t_{k}_us"].sum()) for k in ("draft", "verify", "sample", "host"))
    return replace(
        costs,
        sample=round(float(np.median(steps["t_sample_us"])), 1),
        host=round(float(np.median(steps["t_host_us"])), 1),
        token=round(max(wall - inside, 0.0) / max(n - 1, 1), 1),
    )
