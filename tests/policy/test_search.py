"""Trees that pay: against brute force over every tree, and every way through a text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entmtp.bank.costs import Costs, relative
from entmtp.bank.traces import MAX_RANK
from entmtp.bank.tree import PLAIN, Tree
from entmtp.measure import search
from helpers.traces import make_traces, random_ranks


def all_trees(paths: list[tuple[int, ...]], max_nodes: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    for n in range(max_nodes):
        for chosen in itertools.combinations(paths, n):
            if all(len(p) == 1 or p[:-1] in chosen for p in chosen):
                yield chosen


@st.composite
def cost_tables(draw: st.DrawFn) -> Costs:
    """Costs that are neither flat nor monotone, with drafts that depend on depth and width."""
    verify = {n: draw(st.floats(0.9, 3.0)) * (0.5 + 0.25 * n) for n in (2, 3, 4, 5, 6)} | {1: 1.0}
    step = draw(st.floats(0.0, 0.3))
    wide = draw(st.floats(0.0, 0.3))
    us = [1e3 * step * d for d in range(4)]
    level = tuple((1e3 * step, 1e3 * (step + wide / 3), 1e3 * (step + wide)) for _ in range(3))
    return Costs({0: {n: 1e3 * c for n, c in verify.items()}}, tuple(us), level)


@given(cost_tables(), st.integers(0, 1000), st.booleans())
def test_best_tree_against_brute_force(costs: Costs, seed: int, priced: bool) -> None:
    probabilities = search.node_probabilities(random_ranks(seed, [120], 3), max_rank=2)
    price = 0.9e-3 if priced else None
    found = search.best_tree(probabilities, costs, price, max_nodes=6)
    value = search.objective(found, probabilities, costs, price)
    best = max(
        search.objective(Tree("", t), probabilities, costs, price)
        for t in all_trees(sorted(probabilities), 6)
    )
    assert value >= best - 1e-9 * max(abs(best), 1.0)


@given(st.integers(0, 1000), st.integers(2, 20))
def test_a_tree_that_is_being_changed(seed: int, n_nodes: int) -> None:
    """What is kept along the way is what the paths say, counted anew."""
    rng = np.random.default_rng(seed)
    p = search.node_probabilities(random_ranks(seed, [120], 4, 0.6), max_rank=3)
    shape = search._Shape(search.grow(p, n_nodes), p)
    for _ in range(12):
        leaves = shape.leaves()
        free = [q for q in p if q not in shape.paths and (len(q) == 1 or q[:-1] in shape.paths)]
        expanded = {q[:-1] for q in shape.paths}
        assert set(leaves) == shape.paths - expanded
        assert shape.level_widths() == tuple(
            sum(len(q) == d for q in expanded) for d in range(1 + max(map(len, expanded), default=-1))
        )
        assert shape.tokens == pytest.approx(1 + search.expected(shape.paths, p))
        add = bool(free) and (not leaves or rng.random() < 0.4)
        moves = free if add else leaves
        if moves:
            shape.change(moves[int(rng.integers(len(moves)))], 1 if add else -1)


@given(st.integers(0, 1000), cost_tables(), st.booleans(), st.integers(1, 12))
def test_exchange_never_loses(seed: int, costs: Costs, priced: bool, n_nodes: int) -> None:
    """And stops where no single leaf to drop, path to add, or swap of both, is better."""
    p = search.node_probabilities(random_ranks(seed, [120], 3, 0.6), max_rank=2)
    price = 0.9e-3 if priced else None
    start = Tree("", search.grow(p, n_nodes))
    found = search.exchange(start, p, costs, price, n_pool=99, n_moves=99)
    best = search.objective(found, p, costs, price)
    assert best >= search.objective(start, p, costs, price) - 1e-12
    paths = set(found.paths)
    leaves = [q for q in paths if not any(r[:-1] == q for r in paths)]
    fewer = [paths, *(paths - {leaf} for leaf in leaves)]
    for some in fewer:
        near = [q for q in p if q not in some and (len(q) == 1 or q[:-1] in some)]
        for other in [some, *(some | {q} for q in near)]:
            value = search.objective(search._tree(other), p, costs, price)
            assert value <= best + 1e-8 * abs(best) + 1e-11


FLAT = relative({1: 1.0, 2: 1.1, 3: 50.0, 64: 90.0}, [0, 0.0, 0.0, 0.0])  # two nodes are cheap, three are not


def test_exchange_swaps_where_neither_half_pays() -> None:
    """Without the leaf the tree is worse, with a third node too; the better leaf in its place is better."""
    p = {(0,): 0.5, (1,): 0.2}
    assert search.exchange(Tree("", ((1,),)), p, FLAT, None).paths == ((0,),)
    # and a leaf that was never seen goes first, though no more than one is looked at
    p = {(0,): 0.5, (1,): 0.3}
    start = Tree("", ((0,), (1,), (5,)))
    flat = relative({1: 1.0, 2: 1.1, 3: 1.2, 4: 9.0, 64: 90.0}, [0, 0.0, 0.0])
    assert search.exchange(start, p, flat, None, n_pool=1, n_moves=1).paths == ((0,), (1,))


def test_exchange_looks_beyond_a_plain_start() -> None:
    p = {(0,): 0.9, (1,): 0.05}
    assert search.exchange(PLAIN, p, FLAT, None).paths == ((0,),)


@pytest.mark.parametrize(("us", "price"), [(1e7, None), (1.0, 0.1)])
def test_what_is_worth_the_same_is_no_gain(us: float, price: float | None) -> None:
    p = {(0,): 0.5, (1,): 0.5}
    costs = Costs({0: {n: us * c for n, c in {1: 1.0, 2: 1.1, 3: 50.0, 64: 90.0}.items()}}, (0.0, 0.0), ())
    assert search.exchange(Tree("", ((1,),)), p, costs, price, n_moves=1).paths == ((1,),)


def test_growth_against_brute_force() -> None:
    """The most probable tree of n nodes, among all trees over the observed paths."""
    p = search.node_probabilities(random_ranks(3, [400], 3, 0.6), max_rank=3)
    for n in (2, 3, 4, 5):
        best = max(search.expected(t, p) for t in all_trees(sorted(p), n) if len(t) == n - 1)
        grown = search.grow(p, n)
        assert len(grown) == n - 1
        assert search.expected(grown, p) == pytest.approx(best)


def test_node_probabilities_are_shares() -> None:
    ranks = np.array([[0, 0], [0, 1], [1, 0], [0, -1]], dtype=np.int32)
    assert search.node_probabilities(ranks) == {
        (0,): 3 / 4, (1,): 1 / 4, (0, 0): 1 / 3, (0, 1): 1 / 3, (1, 0): 1 / 4,
    }  # fmt: skip
    # ranks out of reach of any tree are no node
    assert search.node_probabilities(np.array([[MAX_RANK, 0]], dtype=np.int32)) == {}


def walk(ranks: np.ndarray, lengths: list[int], tree: Tree) -> list[int]:
    """Accepted tokens of each step with one tree: the longest prefix of real ranks that is a path of it."""
    accepted, at = [], 0
    for n in lengths:
        i = 0
        while i < n - 1:
            a = 0
            while a < ranks.shape[1] and i + 1 + a < n - 1 and tuple(ranks[at + i, : a + 1]) in tree.paths:
                a += 1
            accepted.append(a)
            i += 1 + a
        at += n
    return accepted


@given(st.integers(0, 10_000))
def test_static_replay_against_a_walk_by_hand(seed: int) -> None:
    lengths = [40, 1, 17, 2]
    ranks = random_ranks(seed, lengths, 3, 0.6)
    tree = Tree.from_paths("t", [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
    costs = relative({1: 1.0, 8: 2.0}, [0, 0.1, 0.2, 0.3])
    r = search.static(make_traces(ranks, lengths), tree, costs)
    assert r.steps["n_accepted"].tolist() == walk(ranks, lengths, tree)
    assert r.n_tokens == sum(n - 1 for n in lengths)
    assert r.us == pytest.approx(len(r.steps) * costs.step(tree), rel=1e-3)


# the second as a busy machine measures them: a larger pass took less time
@pytest.mark.parametrize("verify", [{1: 1.0, 2: 1.2, 3: 1.9}, {1: 1.7, 2: 1.9, 3: 1.4, 4: 1.5}])
@given(st.integers(0, 10_000))
def test_oracle_against_every_way_through_the_text(verify: dict[int, float], seed: int) -> None:
    lengths = [9]
    ranks = random_ranks(seed, lengths, 2, 0.4)
    ranks[seed % 7, 0] = MAX_RANK  # not guessed at all
    costs = relative(verify, [0, 0.1, 0.2])
    beside = [(k,) for k in range(1, 3)]  # tokens that a pass may hold as well
    steps = [
        [costs.step(Tree.from_paths("", [[0] * (d + 1) for d in range(n)] + beside[:m])) for m in range(3)]
        for n in range(3)
    ]
    chain = [min(min(several) for several in steps[n:]) for n in range(3)]

    def best(i: int) -> float:
        if i >= 8:
            return 0.0
        ways = [chain[0] + best(i + 1)]
        for a in (1, 2):
            if i + 1 + a > 8 or not 0 <= ranks[i, a - 1] < MAX_RANK:
                break
            ways.append(chain[a] + best(i + 1 + a))
        return min(ways)

    assert 1e6 * search.oracle(make_traces(ranks, lengths), costs) == pytest.approx(best(0))


def test_the_best_single_tree_is_the_fastest_one() -> None:
    lengths = [200] * 4
    traces = make_traces(random_ranks(5, lengths, 3, 0.7), lengths)
    costs = relative({1: 1.0, 2: 1.2, 4: 1.5, 8: 3.0, 64: 20.0}, [0, 0.05, 0.1, 0.15])
    best = search.best_single(traces, costs)
    us = search.static(traces, best, costs).us
    probabilities = search.node_probabilities(traces.ranks)
    for n in range(1, 12):
        for d in (1, 2, 3):
            assert us <= search.static(traces, Tree("", search.grow(probabilities, n, d)), costs).us
    # where a pass costs as much as its tokens, it is none
    dear = relative({1: 1.0, 64: 64.0}, [0, 0.1, 0.2, 0.3])
    assert search.best_single(traces, dear).paths == ()


@pytest.mark.parametrize("criterion", ["ratio", "price"])
def test_bins_get_the_trees_they_deserve(criterion: str) -> None:
    """Two kinds of text that the entropy tells apart: the heads are right in one and wrong in the other."""
    lengths = [300] * 4
    ranks = random_ranks(7, lengths, 3, 0.95)
    wrong = np.repeat([False, True, False, True], 300)
    ranks[wrong & (ranks[:, 0] >= 0)] = MAX_RANK
    traces = make_traces(ranks, lengths, entropy=np.where(wrong, 3.0, 0.2))
    costs = relative({1: 1.0, 4: 1.5, 64: 20.0}, [0, 0.1, 0.2, 0.3])
    bank = search.bin_bank(traces, costs, window=2.0, n_bins=2, criterion=criterion)
    from entmtp.measure.replay import replay

    r = replay(traces, bank, "entropy", adapt=False)
    plain = replay(traces, bank, "off")
    # half of the text at the speed of a chain of three, half plainly
    chain = costs.step(Tree.from_paths("c", [[0], [0, 0], [0, 0, 0]])) / 4
    ideal = 0.5 * costs.step(PLAIN) + 0.5 * chain
    assert r.us / plain.us == pytest.approx(ideal / costs.step(PLAIN), rel=0.1)
    easy = r.steps["entropy"] < 1.0
    assert (r.steps["n_nodes"][easy] > 1).mean() > 0.95
    assert (r.steps["n_nodes"][r.steps["entropy"] > 2.9] == 1).all()


def test_the_fuller_bin_has_the_place() -> None:
    """Two kinds of text, one of them rare, and room for the tree of one."""
    lengths = [1000] * 2
    ranks = random_ranks(3, lengths, 1, 0.95)
    rare = np.arange(2000) % 10 == 0
    ranks[rare & (ranks[:, 0] == 0)] = 5  # there the best guess is wrong, the sixth is right
    entropy = np.where(rare, 9.0, 0.5)
    traces = make_traces(ranks, lengths, entropy)
    costs = relative({1: 1.0, 2: 1.05, 64: 60.0}, [0, 0.0])
    bank = search.bin_bank(traces, costs, window=1.0, n_bins=10, criterion="ratio", max_trees=9)
    assert {((0,),), ((5,),)} <= {t.paths for t in bank.trees}
    bank = search.bin_bank(traces, costs, window=1.0, n_bins=10, criterion="ratio", max_trees=2)
    assert [t.paths for t in bank.trees] == [(), ((0,),)]
