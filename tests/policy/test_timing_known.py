"""Costs as they are measured where what passes and drafts take is known: on a machine whose clock is set by them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from entmtp.bank.costs import N_VERIFY, WIDTHS, Costs
from entmtp.measure import at_load, timing
from helpers.clocked import Machine


def passes(depth: int, n: int) -> float:
    """µs; 3 tokens cost more than 4, as some kernels have it."""
    return 100.0 + depth + 10 * n + 50 * (n == 3)


def chains(depth: int) -> float:
    return 7.0 * depth


def levels(head: int, width: int) -> float:
    return 10.0 + head + 2 * width


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """Makes a machine whose clock `timing` looks at."""
    monkeypatch.setattr(timing, "machine_key", lambda llm: "this machine")

    def make(**how: Any) -> Machine:
        machine = Machine(passes, chains, levels, **how)
        monkeypatch.setattr(timing, "time", machine)
        return machine

    return make


def of(depths: tuple[int, ...], sizes: tuple[int, ...]) -> dict[int, dict[int, float]]:
    return {d: {n: passes(d, n) for n in sizes} for d in depths}


def test_all_costs(timed: Callable[..., Machine]) -> None:
    machine, said = timed(n_heads=3), []
    c = timing.measure(
        machine, (1, 2, 3, 4, 8), (64, 16), n_rounds=3, progress=lambda *x: said.append(x)
    )  # fmt: skip
    assert c == Costs(
        verify=of((16, 64), (1, 2, 3, 4, 8)), chain=(0.0, 7.0, 14.0, 21.0),
        level=tuple(tuple(levels(head, w) for w in WIDTHS) for head in range(3)),
        context=16, spread=0.0, build=0.0, key="this machine",
    )  # fmt: skip
    # five sizes and three chains, three rounds, two contexts, each with two steps after one that builds
    assert said == [("costs of passes", i, 48) for i in range(1, 49)]
    assert [e for e in machine.evaluated if e[1] > 1] == [(0, 16), (0, 64)]
    at = [depth for depth, n in machine.evaluated if n == 1]
    assert at == [15, 16, 17, 18] * 24 + [63, 64, 65, 66] * 24
    assert not machine.steps


def test_heads_that_cost_the_same_for_any_number_of_paths(timed: Callable[..., Machine]) -> None:
    c = timing.measure(timed(n_heads=2, grounded=False), (1, 2), (16,), n_rounds=1)
    assert c.level == ((levels(0, 1),) * 3, (levels(1, 1),) * 3)


def test_chains_are_never_cheaper_than_shorter_ones(timed: Callable[..., Machine]) -> None:
    machine = timed(n_heads=3)
    machine.chains = lambda depth: (5.0, 30.0, 20.0)[depth - 1]
    assert timing.measure(machine, (1, 2), (16,), n_rounds=1).chain == (0.0, 5.0, 30.0, 30.0)


def test_within_a_budget(timed: Callable[..., Machine]) -> None:
    """What is asked first comes first, one and two tokens whatever they take; chains are the sum of their heads."""
    machine, said = timed(n_heads=2), []
    c = timing.measure(
        machine, (1, 4, 2, 8), (16,), n_rounds=4, budget=0.0, progress=lambda *x: said.append(x)
    )  # fmt: skip
    assert c.verify == of((16,), (1, 4, 2)) and c.chain == (0.0, *accumulate(levels(h, 1) for h in range(2)))
    assert said == [("costs of passes", i, 16) for i in (1, 2, 3)]
    assert len(c.level) == 2
    # one step of each size, after one that builds; and the way back
    at = [depth for depth, n in machine.evaluated if n == 1]
    assert at == [15, 16, 17] * 3

    said.clear()
    machine = timed(n_heads=2)
    whole = timing.measure(
        machine, (1, 4, 2, 8), (16,), n_rounds=4, budget=60.0, progress=lambda *x: said.append(x)
    )  # fmt: skip
    assert whole.verify == of((16,), (1, 4, 2, 8)) and len(said) == 16
    assert len([depth for depth, n in machine.evaluated if n == 1]) == 3 * 16
    # a budget that lasts for two or three rounds of some four passes each: back, a new graph, a pass with it
    machine = timed(n_heads=2)
    us = sum(4 * passes(16, n) for n in (1, 4, 2, 8))
    timing.measure(machine, (1, 4, 2, 8), (16,), n_rounds=400, budget=2 * us / 1e6)
    assert 8 <= len([depth for depth, n in machine.evaluated if n == 1]) // 3 <= 12


def test_what_has_no_room_is_not_measured(timed: Callable[..., Machine]) -> None:
    c = timing.measure(timed(n_ctx=40, n_batch=9), (1, 2, 8, 9, 16), (16, 500, 1000), n_rounds=1)
    assert c.verify == of((16, 24), (1, 2, 8))
    # behind one token at least, and before the eight steps that a tree is timed in at most
    assert timing.measure(timed(n_ctx=17), (1, 4, 8, 9, 16), (16,), n_rounds=1).verify == of((1,), (1, 4, 8))


def test_a_device_builds_graphs(timed: Callable[..., Machine]) -> None:
    """The first two passes of a size, which build and capture, do not count as passes; what they take longer does."""
    builds = (5000.0, 3000.0)
    c = timing.measure(timed(n_gpu_layers=-1, builds=builds), (1, 2, 4, 8), (16,), n_rounds=3)
    assert c.verify == of((16,), (1, 2, 4, 8)) and c.spread == 0.0
    assert c.build == 8000.0  # of 2, 4 and 8 tokens; the plain pass had its graph
    machine = timed(builds=builds)
    assert timing.measure(machine, (1, 2, 4, 8), (16,), n_rounds=3).build == 0.0  # a CPU's graphs cost little
    machine = timed(builds=builds)
    machine.rpc_servers = ["127.0.0.1:50052"]
    assert timing.on_device(machine)
    assert timing.measure(machine, (1, 2, 4, 8), (16,), n_rounds=3).build == 8000.0


def test_medians_and_spread(timed: Callable[..., Machine]) -> None:
    """One pass in five is disturbed: the median does not see it. Half the distance of the quartiles is the spread."""
    machine, n = timed(), 0

    def disturbed(depth: int, size: int) -> float:
        nonlocal n
        n += 1
        return passes(depth, size) * (10.0 if n % 5 == 0 else 1.0)

    machine.passes = disturbed
    c = timing.measure(machine, (1, 2, 4), (16,), n_rounds=20)
    assert c.verify == of((16,), (1, 2, 4)) and c.spread == 0.0
    t = timing._Timings()
    t.us = {"a": [8.0, 10.0, 12.0], "b": [1.0, 1.0, 1.0], "c": [5.0, 10.0], "d": [1.0, 99.0]}
    t.add("c", 15.0)
    assert t.spread() == pytest.approx(0.1) and t.median("c") == 10.0  # of 0.1, 0 and 0.25; two say nothing
    assert timing._Timings().spread() == 0.0


def test_where_memory_holds_no_trees(timed: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of as many tokens as can be taken back, each behind the one before; the first round builds graphs."""
    monkeypatch.setattr(timing, "llama_cpp", SimpleNamespace(llama_n_rs_seq=lambda ctx: 3))
    machine = timed(builds=(5000.0,))
    machine.trees = False
    c = timing.measure(machine, n_rounds=2)
    places = {1: 16, 2: 17, 3: 19, 4: 22}
    assert c == Costs(
        verify={16: {n: passes(at, n) for n, at in places.items()}}, chain=(0.0,), level=(), context=16,
        key="this machine",
    )  # fmt: skip
    assert machine.evaluated == [(0, 16), *((at, n) for n, at in places.items())] * 3
    machine = timed(n_ctx=22)
    machine.trees = False
    assert list(timing.measure(machine, n_rounds=1).verify[16]) == [1, 2, 3]
    machine = timed()
    machine.trees = False
    timing.measure(machine, n_rounds=10**9, budget=0.0)
    assert len(machine.evaluated) == 3 * 5  # a round that builds, and two
    machine = timed()
    machine.trees = False
    timing.measure(machine, n_rounds=4, budget=60.0)
    assert len(machine.evaluated) == 5 * 5


def test_the_rest_of_a_step(timed: Callable[..., Machine]) -> None:
    """Of 520 µs a token 500 are the decoder's, 70 of them sampling and 30 its own; the first generation warms up."""
    machine = timed()
    before = Costs({16: {1: 400.0}}, (0.0,), ())
    c = timing.measure_rest(machine, before, n_tokens=10, temp=0.5)
    assert (c.sample, c.host, c.token) == (70.0, 30.0, 20.0) and c.verify == before.verify
    assert machine.tree_policy == "off" and machine.asked[0] == {"temp": 0.5} and len(machine.asked) == 18
    machine = timed()
    assert timing.measure_rest(machine, before, n_tokens=2).token == 20.0


def test_sizes_that_are_timed() -> None:
    """Small ones all, larger ones no more than a quarter apart, as costs between are read off a line."""
    sizes = timing.SIZES
    assert sizes[0] == 1 and sizes[-1] == N_VERIFY and set(range(1, 9)) <= set(sizes)
    assert all(a < b <= max(1.25 * a, a + 1) for a, b in pairwise(sizes))
    assert all(n % 4 == 0 for n in sizes if n >= 16) and all(n % 8 == 0 for n in sizes if n >= 32)
    powers = [2**i for i in range(7)]
    assert list(timing.DEVICE_SIZES) == powers
    assert set(powers) | set(range(1, 9)) <= set(at_load.QUICK_SIZES) and at_load.CHECK_SIZES[:2] == (1, 2)


def test_twelve_rounds_unless_told(timed: Callable[..., Machine]) -> None:
    said: list[tuple[str, int, int]] = []
    timing.measure(timed(), (1, 2), (16,), progress=lambda *x: said.append(x))
    assert said[-1] == ("costs of passes", 24, 24)


def test_graphs_that_take_as_long_as_a_pass(timed: Callable[..., Machine]) -> None:
    """They were built: a graph from before takes nothing."""
    us = passes(16, 2)
    machine = timed(n_gpu_layers=-1, builds=(us / 2, us / 2))
    assert timing.measure(machine, (1, 2), (16,), n_rounds=1).build == pytest.approx(us)


def test_costs_of_before_that_another_program_disturbed(timed: Callable[..., Machine]) -> None:
    """Passes or drafts that are faster now by more than they vary; slower ones say nothing."""
    machine = timed(n_heads=2)
    now = {n: passes(16, n) for n in (1, 2, 4, 3, 8)}
    chain = levels(0, 1) + levels(1, 1)

    def were_disturbed(by_passes: float, by_drafts: float) -> bool:
        verify = {16: {n: by_passes * us for n, us in now.items()}}
        return at_load.were_disturbed(machine, Costs(verify, (0.0, by_drafts * chain), ()))

    for by, disturbed in ((0.1, False), (1.0, False), (1.25, False), (1.35, True), (9.0, True)):
        assert were_disturbed(by, 1.0) == disturbed
    for by, disturbed in ((0.1, False), (1.4, False), (1.6, True)):
        assert were_disturbed(1.0, by) == disturbed
    # the look takes no more than a tenth of a second, where that is enough for one and two tokens
    machine = timed()
    machine.passes = lambda depth, n: 20000.0
    at_load.were_disturbed(machine, Costs({16: {1: 1.0, 2: 1.0}}, (0.0,), ()))
    assert machine.us < 0.4e6
