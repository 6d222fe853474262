"""The number of threads that follows the machine: what it follows, what it decides, and that no text depends on it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entmtp import Llama, drafting, threads
from entmtp.bank import Costs
from entmtp.common.machine import _fast_of_linux, fast_cores, usable_cpus
from entmtp.threads import Load, Threads

PROMPT = b"Once upon a time there was a"


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield program
    program.kill()
    program.wait()


def test_load_sees_a_busy_program_but_not_this_one(busy: subprocess.Popen[bytes]) -> None:
    load = Load()
    assert load.n_cpus == usable_cpus()
    time.sleep(0.5)
    beside = load.others()
    assert 0.3 < beside <= load.n_cpus  # all of a processor, unless the whole machine is fought for
    # what we compute ourselves is not others'
    load.others()
    begin, end = time.perf_counter(), time.process_time() + 0.5
    while time.process_time() < end:
        pass
    share = 0.5 / (time.perf_counter() - begin)
    assert load.others() <= load.n_cpus - share + 0.15


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(percpu: bool) -> None:
        raise PermissionError("/proc/stat")

    monkeypatch.setattr(threads.psutil, "cpu_times", hidden)
    assert Load().others() == 0.0
    t = Threads(2)
    t._looked = 0.0
    assert t.look() == 2


def test_threads_follow_what_is_free() -> None:
    t = Threads(4)
    t._settle(4.0, 1)
    assert t.now == 4
    t._settle(3.5, 1)  # somebody opens a page
    assert t.now == 4
    t._settle(3.0, 1)  # somebody computes
    assert t.now == 3
    t._settle(0.1, 1)
    assert t.now == 1  # never none
    t._settle(4.0, 1)
    assert t.now == 1  # once may be chance
    t._settle(4.0, 1)
    assert t.now == 4
    t._settle(4.0, 2)  # another thread of this process computes too
    assert t.now == 2


@given(st.integers(1, 64), st.lists(st.floats(0.0, 64.0), max_size=30), st.integers(1, 4))
def test_threads_are_never_none_nor_more_than_fit(most: int, free: list[float], n_sharing: int) -> None:
    t = Threads(most)
    for x in free:
        before = t.now
        t._settle(x, n_sharing)
        assert 1 <= t.now <= most
        assert t.now == 1 or t.now * n_sharing <= x + threads.SLACK
        assert t.now <= before or t.now * n_sharing <= x + threads.CALM
    for _ in range(threads.LOOKS):
        t._settle(64.0, 1)
    assert t.now == most


def test_two_threads_of_a_process_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_computing", {})
    ours, theirs = Threads(1), Threads(1)
    ours.look()
    other = threading.Thread(target=theirs.look)
    other.start()
    other.join()
    assert len(threads._computing) == 2
    time.sleep(4 * threads.INTERVAL)
    ours.look()
    assert list(threads._computing) == [threading.get_ident()]  # the other one has stopped


def cpu(folder: Path, n: int, siblings: str, capacity: int | None = None) -> None:
    here = folder / f"system/cpu/cpu{n}/topology"
    here.mkdir(parents=True)
    (here / "thread_siblings_list").write_text(siblings + "\n")
    if capacity is not None:
        (here.parent / "cpu_capacity").write_text(f"{capacity}\n")


def test_cores_worth_a_thread(tmp_path: Path) -> None:
    smt = tmp_path / "smt"  # 4 cores, 8 threads
    for n in range(8):
        cpu(smt, n, f"{n % 4},{n % 4 + 4}")
    assert _fast_of_linux(set(range(8)), smt) == 4
    assert _fast_of_linux({0, 4, 1}, smt) == 2  # bound to two cores
    hybrid = tmp_path / "hybrid"  # two fast cores of two threads, four slow ones
    for n in range(8):
        cpu(hybrid, n, f"{n // 2 * 2}-{n // 2 * 2 + 1}" if n < 4 else f"{n}")
    (hybrid / "cpu_core").mkdir()
    (hybrid / "cpu_core/cpus").write_text("0-3\n")
    assert _fast_of_linux(set(range(8)), hybrid) == 2
    assert _fast_of_linux({5, 6}, hybrid) == 2  # bound to the slow ones
    arm = tmp_path / "arm"  # big, middling, little
    for n, capacity in enumerate([160, 160, 160, 160, 498, 498, 1024, 1024]):
        cpu(arm, n, f"{n}", capacity)
    assert _fast_of_linux(set(range(8)), arm) == 2
    assert _fast_of_linux({0, 1, 2}, arm) == 3
    assert _fast_of_linux({0, 1}, tmp_path / "nothing") == 2
    assert 1 <= fast_cores() <= usable_cpus()


def costs(one: float) -> Costs:
    return Costs({64: {1: one, 2: 1.2 * one}}, (0.0, 0.1 * one), ((0.1 * one,) * 3,))


def test_costs_by_number_of_threads() -> None:
    assert drafting.halved(12) == [12, 6, 3, 1]
    found = {4: costs(100.0), 2: costs(101.0), 1: costs(180.0)}
    assert drafting.fastest(found) == 2  # no worse than four
    assert drafting.costs_for(2, found) is found[2]
    between = drafting.costs_for(3, {4: costs(100.0)})
    assert between is not None and between.verify[64][1] == pytest.approx(100.0 * 4 / 3)
    assert between.chain[1] == pytest.approx(10.0 * 4 / 3) and between.key is None
    assert drafting.costs_for(3, {}) is None


@pytest.mark.parametrize("heads", [False, True])
def test_text_does_not_depend_on_threads_that_change(models: dict[str, Path], heads: bool) -> None:
    how = {"draft": "entmtp", "n_ctx": 512, "verbose": False} | ({"heads": models["hydra"]} if heads else {})
    with closing(Llama(models["q8_0"], n_ctx=512, verbose=False, n_threads=1, n_threads_batch=1)) as plain:
        prompt = plain.tokenize(PROMPT)
        plain.set_seed(7)
        expected = [t for t, _ in zip(plain.generate(prompt, temp=0.8), range(120), strict=False)]
    with closing(Llama(models["q8_0"], **how)) as llm:
        assert llm.n_threads == llm.n_threads_batch <= fast_cores()
        llm.set_seed(7)
        got = []
        for token in llm.generate(prompt, temp=0.8):
            got.append(token)
            llm.compute_on(1 + len(got) % 3)  # also in the middle of a tree
            if len(got) == len(expected):
                break
        assert got == expected
        assert llm.draft_stats.n_accepted > 0
        llm.set_threads(1)
        assert llm.n_threads == 1
        with pytest.raises(ValueError, match="at least 1"):
            llm.set_threads(0)
        llm.set_threads()
        assert llm.n_threads == fast_cores()


def test_a_number_that_is_given_stays(models: dict[str, Path]) -> None:
    for asked, there in (({"n_threads": 1}, 1), ({"n_threads": 2, "n_threads_batch": 3}, 2)):
        with closing(Llama(models["q8_0"], draft="entmtp", n_ctx=256, verbose=False, **asked)) as llm:
            assert llm._threads is None and llm.n_threads == there
            assert llm.context_params.n_threads == there
    with closing(Llama(models["q8_0"], n_ctx=256, verbose=False, kernels="off")) as llm:
        assert llm._threads is None  # ggml's kernels: as llama-cpp-python


def test_costs_are_measured_for_every_number(models: dict[str, Path]) -> None:
    with closing(Llama(models["q8_0"], draft="entmtp", n_ctx=256, verbose=False)) as llm:
        keys = {n: c.key for n, c in llm._costs.items()}
        assert (
            1 in keys
            and set(keys) <= set(drafting.halved(fast_cores()))
            and len(set(keys.values())) == len(keys)
        )
