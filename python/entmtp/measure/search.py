"""Trees that pay: from rank traces and measured costs to topologies, without the model.

A tree's expected accepted tokens are the sum over its nodes of the probability that the real text runs through the
node. These probabilities fall from parent to child, so without regard to drafts the best tree of n nodes is the n
most probable paths. A draft costs more with every level and with every path that is expanded, which exchange moves
take care of. The cost of a pass is neither flat nor monotone in n, so every n is tried.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..bank.bank import Bank
from ..bank.costs import N_VERIFY, Costs
from ..bank.traces import MAX_RANK as UNRANKED
from ..bank.traces import Traces
from ..bank.tree import PLAIN, Paths, Tree
from .replay import Replay, replay

MAX_RANK = 16  # deeper guesses of one head are not worth a node
Path = tuple[int, ...]


def node_probabilities(ranks: npt.NDArray[np.int32], max_rank: int = MAX_RANK) -> dict[Path, float]:
    """How often each rank path came true, over the positions where the text is long enough. {path: probability}

    Args:
        ranks: [n, n_heads], -1 where the text ends; see `entmtp.traces.Traces`.
    """
    result: dict[Path, float] = {}
    for depth in range(1, ranks.shape[1] + 1):
        rows = ranks[ranks[:, depth - 1] >= 0, :depth]
        if not len(rows):
            break
        counts = Counter(map(tuple, rows[(rows < max_rank).all(axis=1)].tolist()))
        result |= {path: count / len(rows) for path, count in counts.items()}
    # positions near the end of a text know their first ranks only, so by chance a child may seem likelier than its
    # parent
    for path in sorted(result, key=len):
        if len(path) > 1:
            result[path] = min(result[path], result.get(path[:-1], 0.0))
    return {p: x for p, x in result.items() if x > 0.0}


def expected(tree: Iterable[Path], probabilities: dict[Path, float]) -> float:
    """Expected accepted tokens of a step."""
    return sum(probabilities.get(p, 0.0) for p in tree)


def grow(probabilities: dict[Path, float], n_nodes: int, depth: int | None = None) -> Paths:
    """The n_nodes - 1 most probable paths below the root, at most `depth` deep; their parents are always among them."""
    paths = (p for p in probabilities if depth is None or len(p) <= depth)
    best = sorted(paths, key=lambda p: (-probabilities[p], len(p), p))[: n_nodes - 1]
    return tuple(sorted(best, key=lambda p: (len(p), p)))


def objective(tree: Tree, probabilities: dict[Path, float], costs: Costs, price: float | None) -> float:
    """What is maximised: tokens per microsecond, or with a price (tokens per microsecond) tokens less the cost's
    worth."""
    tokens, us = 1.0 + expected(tree.paths, probabilities), costs.step(tree)
    return tokens / us if price is None else tokens - price * us


class _Shape:
    """A tree that is being changed: what moves cost, without building the tree."""

    def __init__(self, paths: Iterable[Path], probabilities: dict[Path, float]):
        self.probabilities = probabilities
        self.paths = set(paths)
        self.children = Counter(p[:-1] for p in self.paths)
        self.widths = Counter(len(p) for p in self.children)
        self.tokens = 1.0 + expected(self.paths, probabilities)

    def change(self, path: Path, sign: int) -> None:
        """Add (1) or drop (-1) a leaf."""
        (self.paths.add if sign > 0 else self.paths.remove)(path)
        parent = path[:-1]
        before = self.children[parent] > 0
        self.children[parent] += sign
        self.widths[len(parent)] += (self.children[parent] > 0) - before
        self.tokens += sign * self.probabilities.get(path, 0.0)

    def leaves(self) -> list[Path]:
        return [p for p in self.paths if not self.children[p]]

    def level_widths(self) -> tuple[int, ...]:
        """Expanded paths on each level, as `Costs.draft_of_widths` takes them."""
        depth = max((d + 1 for d, n in self.widths.items() if n), default=0)
        return tuple(self.widths[d] for d in range(depth))


def exchange(
    tree: Tree,
    probabilities: dict[Path, float],
    costs: Costs,
    price: float | None,
    n_pool: int = 8,
    n_moves: int = 24,
) -> Tree:
    """Better the tree by moves that the greedy growth cannot see: drop a leaf, add a path, or both, while it pays.

    Looked at are the least probable leaves, those that are the only guess below their parent (without them it need
    not be expanded), and the most probable paths that could be added, `n_pool` of each; at most `n_moves` moves are
    made.
    """
    ranked = sorted(probabilities, key=lambda p: (-probabilities[p], len(p), p))[
        : 4 * (tree.n_nodes + n_pool)
    ]
    shape = _Shape(tree.paths, probabilities)
    curve = costs.curve()
    draft = functools.lru_cache(maxsize=None)(costs.draft_of_widths)

    def value() -> float:
        us = float(curve[len(shape.paths)]) + draft(shape.level_widths())
        return shape.tokens / us if price is None else shape.tokens - price * us

    best = value()
    for _ in range(n_moves):
        top: tuple[float, tuple[tuple[Path, int], ...]] = (best + 1e-9 * abs(best) + 1e-12, ())

        def consider(*move: tuple[Path, int]) -> None:
            nonlocal top
            for path, sign in move:
                shape.change(path, sign)
            if len(shape.paths) < N_VERIFY and (v := value()) > top[0]:
                top = (v, move)
            for path, sign in reversed(move):
                shape.change(path, -sign)

        leaves = sorted(shape.leaves(), key=lambda p: (probabilities.get(p, 0.0), p))
        leaves = leaves[:n_pool] + [p for p in leaves[n_pool:] if shape.children[p[:-1]] == 1][:n_pool]
        for leaf in leaves:
            consider((leaf, -1))
        addable = (p for p in ranked if p not in shape.paths and (len(p) == 1 or p[:-1] in shape.paths))
        for new in itertools.islice(addable, n_pool):
            consider((new, 1))
            for leaf in leaves:
                if leaf != new[:-1]:
                    consider((leaf, -1), (new, 1))
        if not top[1]:
            break
        best = top[0]
        for path, sign in top[1]:
            shape.change(path, sign)
    return _tree(shape.paths)


def _tree(paths: Iterable[Path]) -> Tree:
    return Tree("", tuple(sorted(paths, key=lambda p: (len(p), p))))


def best_tree(
    probabilities: dict[Path, float], costs: Costs, price: float | None = None, max_nodes: int = N_VERIFY
) -> Tree:
    """The tree that maximises `objective`: greedy growth of every size and depth, then exchange moves. May be plain."""
    ranked = sorted(probabilities, key=lambda p: (-probabilities[p], len(p), p))
    curve = costs.curve()
    grown: list[tuple[float, Paths]] = [(objective(PLAIN, probabilities, costs, price), ())]
    for depth in range(1, len(costs.chain)):
        order = [p for p in ranked if len(p) <= depth][: max_nodes - 1]
        shape = _Shape((), probabilities)
        for i, path in enumerate(order):
            shape.change(path, 1)
            us = float(curve[i + 1]) + costs.draft_of_widths(shape.level_widths())
            grown.append(
                (shape.tokens / us if price is None else shape.tokens - price * us, tuple(order[: i + 1]))
            )
    # exchange climbs one hill at a time: start from the best trees of several sizes
    starts: dict[int, tuple[float, Paths]] = {}
    for score, paths in grown:
        size = int(np.log2(len(paths) + 1))
        starts[size] = max(starts.get(size, (-np.inf, ())), (score, paths), key=lambda x: x[0])
    best = sorted(starts.values(), key=lambda x: -x[0])[:3]
    trees = [exchange(_tree(paths), probabilities, costs, price) for _, paths in best]
    return max(trees, key=lambda t: objective(t, probabilities, costs, price))


def pareto(probabilities: dict[Path, float], costs: Costs) -> list[tuple[int, float, float]]:
    """Acceptance per node budget: (nodes, tokens per step, tokens per second) of the best tree of each size."""
    rows = []
    for n in range(1, N_VERIFY + 1):
        trees = [_tree(grow(probabilities, n, d)) for d in range(1, len(costs.chain))] if n > 1 else [PLAIN]
        tokens = max(1.0 + expected(t.paths, probabilities) for t in trees)
        speed = max((1.0 + expected(t.paths, probabilities)) / costs.step(t) for t in trees)
        rows.append((n, tokens, 1e6 * speed))
    return rows


def name(tree: Tree) -> str:
    """`n4d2`: four nodes, two levels."""
    return f"n{tree.n_nodes}d{tree.max_depth}" if tree.paths else "plain"


def named(trees: Iterable[Tree]) -> tuple[Tree, ...]:
    """Plain decoding first, then the others by size, each once, under names of their own."""
    unique = {t.paths: t for t in trees if t.paths}
    result, seen = [PLAIN], Counter[str]()
    for tree in sorted(unique.values(), key=lambda t: (t.n_nodes, t.max_depth, t.paths)):
        label = name(tree)
        seen[label] += 1
        result.append(
            Tree(label if seen[label] == 1 else f"{label}{'abcdefgh'[seen[label] - 1]}", tree.paths)
        )
    return tuple(result)


def oracle(traces: Traces, costs: Costs) -> float:
    """Seconds of a decoder that knows the future: each step verifies a chain of real tokens alone, of the best length.

    A chain can hold a real token only if the heads rank it at all (below `entmtp.traces.MAX_RANK`). The lengths
    minimise the time of the whole text, by dynamic programming from its end. Draft and verify time, as `Replay.us`;
    where a larger pass was measured to take less time, the chain is verified in that.
    """
    curve = costs.curve()
    drafted = [
        costs.draft(Tree("", tuple((0,) * (d + 1) for d in range(n)))) for n in range(traces.n_heads + 1)
    ]
    steps = [curve[0], *(curve[n:].min() + drafted[n] for n in range(1, traces.n_heads + 1))]
    chain = [min(steps[n:]) for n in range(traces.n_heads + 1)]  # us, by tokens of it that are kept
    total = 0.0
    for part in traces.slices():
        ranks = traces.ranks[part]
        n = len(ranks) - 1  # the last token is sampled, not evaluated
        cost = np.zeros(n + 1)
        for i in range(n - 1, -1, -1):
            options = [chain[0] + cost[i + 1]]
            for a in range(1, traces.n_heads + 1):
                if i + 1 + a > n or not 0 <= ranks[i, a - 1] < UNRANKED:
                    break
                options.append(chain[a] + cost[i + 1 + a])
            cost[i] = min(options)
        total += cost[0]
    return total / 1e6


def entropy_edges(running: npt.NDArray[np.float64], n_bins: int) -> tuple[float, ...]:
    """Inner edges of equally filled bins, nats, increasing."""
    edges = np.unique(np.quantile(running, np.arange(1, n_bins) / n_bins).round(3))
    return tuple(float(e) for e in edges if e > 0.0)


def best_single(traces: Traces, costs: Costs) -> Tree:
    """The tree that decodes the traces fastest when it is used for every step, by replay; may be plain."""
    probabilities = node_probabilities(traces.ranks)
    shapes = {
        grow(probabilities, n, d) for n in (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32) for d in (1, 2, 3, 4)
    }
    shapes |= {best_tree(probabilities, costs).paths}
    return min((_tree(paths) for paths in shapes | {()}), key=lambda t: static(traces, t, costs).us)


def static(traces: Traces, tree: Tree, costs: Costs) -> Replay:
    """One tree for every step."""
    if not tree.paths:
        return replay(traces, Bank("plain", (PLAIN,), costs=costs), "off")
    return replay(traces, Bank("static", (PLAIN, Tree("one", tree.paths)), costs=costs), "static", 1)


def bin_bank(
    traces: Traces,
    costs: Costs,
    window: float,
    n_bins: int,
    criterion: str,
    more: Iterable[Tree] = (),
    max_trees: int = 8,
) -> Bank:
    """A bank for the entropy policy: the best tree of every entropy bin, and `more` that are to be there anyway.

    Free places go to the best trees of small sizes: what pays when the machine or the text turns out better than it
    was when tuned.

    With criterion `price` the price is the bank's own throughput: found by iteration (Dinkelbach 1967).
    """
    running = traces.running(window)
    edges = entropy_edges(running, n_bins)
    bins = np.searchsorted(edges, running, side="right")
    share = np.bincount(bins, minlength=len(edges) + 1) / len(bins)
    tables = [node_probabilities(traces.ranks[bins == b]) for b in range(len(edges) + 1)]
    price = None
    for _ in range(1 if criterion == "ratio" else 4):
        best = [best_tree(p, costs, price) for p in tables]
        tokens = np.array([1 + expected(t.paths, p) for t, p in zip(best, tables, strict=True)])
        us = np.array([costs.step(t) for t in best])
        # a bin is entered once per step, and is left after that many tokens
        weight = share / tokens
        new = float((weight * tokens).sum() / (weight * us).sum())
        if criterion == "ratio" or (price is not None and abs(new - price) < 1e-6 * price):
            break
        price = new
    # the fuller bins first, if there are more trees than a bank should hold
    order = np.argsort(-share)
    wanted = [t.paths for t in more] + [best[b].paths for b in order] + spares(traces, costs)
    kept = list(dict.fromkeys(paths for paths in wanted if paths))[: max_trees - 1]
    trees = named(Tree("", paths) for paths in kept)
    return replace(calibrated(traces, costs, trees, window, n_bins), criterion=criterion)


def spares(traces: Traces, costs: Costs, sizes: Sequence[int] = (2, 4, 3, 8, 6, 16, 12)) -> list[Paths]:
    """The tree of most tokens per time of each size, the most useful sizes first."""
    p = node_probabilities(traces.ranks)
    shapes = ([grow(p, n, d) for d in range(1, len(costs.chain))] for n in sizes)
    return [max(options, key=lambda paths: objective(_tree(paths), p, costs, None)) for options in shapes]


def calibrated(traces: Traces, costs: Costs, trees: tuple[Tree, ...], window: float, n_bins: int) -> Bank:
    """A bank of given trees with their acceptance in equally filled entropy bins."""
    running = traces.running(window)
    edges = entropy_edges(running, n_bins)
    bins = np.searchsorted(edges, running, side="right")
    acceptance = []
    for b in range(len(edges) + 1):
        p = node_probabilities(traces.ranks[bins == b])
        acceptance.append(tuple(tuple(round(p.get(path, 0.0), 4) for path in tree.paths) for tree in trees))
    return Bank("", trees, ema_window=window, bin_edges=edges, acceptance=tuple(acceptance), costs=costs)
