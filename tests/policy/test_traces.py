"""Rank traces without a model: what their views mean, by hand, and which ones are refused."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entmtp.bank.traces import MAX_RANK, Traces, join

N_HEADS = 3
TASKS, PROMPTS, LENGTHS = ("a", "b", "a", "a", "b"), (7, 7, 8, 7, 9), (4, 1, 3, 2, 5)


def make(sees_path: bool = True, seed: int = 0) -> Traces:
    """Five texts of two tasks; a prompt of task a was answered twice."""
    rng = np.random.default_rng(seed)
    n = sum(LENGTHS)
    n_rows = 1 + 4 * (N_HEADS - 1) if sees_path else N_HEADS
    return Traces(
        np.array(LENGTHS, np.int32), TASKS, PROMPTS,
        rng.normal(size=(n, 3)).astype(np.float32),
        rng.integers(-1, MAX_RANK + 1, (n, N_HEADS), dtype=np.int32),
        -rng.random((n, n_rows, 8), dtype=np.float32),
        sees_path, {"seed": seed},
    )  # fmt: skip


def same(a: Traces, b: Traces) -> bool:
    arrays = ("n_tokens", "signals", "ranks", "log_p")
    return (a.task, a.prompt, a.sees_path) == (b.task, b.prompt, b.sees_path) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays
    )


def test_signals_by_name() -> None:
    traces = make()
    assert traces.n_heads == N_HEADS
    assert traces.entropy.tolist() == traces.signals[:, 0].tolist()
    assert traces.log_root.tolist() == traces.signals[:, 2].tolist()
    assert traces.slices() == [slice(0, 4), slice(4, 5), slice(5, 8), slice(8, 10), slice(10, 15)]


def test_running_entropy_is_a_weighted_mean_of_its_text() -> None:
    traces, window = make(), 4.0
    decay = 1 - 2 / (window + 1)
    expected = []
    for part in ([0, 1, 2, 3], [4], [5, 6, 7], [8, 9], [10, 11, 12, 13, 14]):
        for n in range(1, len(part) + 1):
            weights = [decay ** (n - 1 - i) for i in range(n)]
            expected.append(np.average(traces.signals[part[:n], 0], weights=weights))
    np.testing.assert_allclose(traces.running(window), expected, rtol=1e-6)


def test_rows_of_a_head() -> None:
    traces = make(sees_path=True)
    for head, rows in enumerate(([0], [1, 2, 3, 4], [5, 6, 7, 8])):
        assert np.array_equal(traces.level(head), traces.log_p[:, rows])
    # heads that do not see the path guess the same after every one of the four
    traces = make(sees_path=False)
    for head, rows in enumerate(([0], [1] * 4, [2] * 4)):
        assert np.array_equal(traces.level(head), traces.log_p[:, rows])


def test_where_the_text_follows_a_path() -> None:
    traces = make()
    ranks = np.zeros((15, N_HEADS), np.int32)
    ranks[3], ranks[5], ranks[9] = (1, 2, 0), (1, 0, 0), (0, 2, 0)
    traces = replace(traces, ranks=ranks)
    assert np.flatnonzero(traces.follows((1, 2))).tolist() == [3]
    assert np.flatnonzero(traces.follows((1,))).tolist() == [3, 5]
    assert traces.follows(()).all()


def test_picked_texts() -> None:
    traces = make()
    some = traces.pick([3, 1])
    index = [8, 9, 4]
    assert (some.n_tokens.tolist(), some.task, some.prompt) == ([2, 1], ("a", "b"), (7, 7))
    for name in ("signals", "ranks", "log_p"):
        assert np.array_equal(getattr(some, name), getattr(traces, name)[index])
    assert same(traces.of_task("b"), traces.pick([1, 4]))
    nothing = traces.of_task("c")
    assert nothing.task == () and len(nothing.signals) == len(nothing.n_tokens) == 0


def test_halves_alternate_by_the_prompts_of_a_task() -> None:
    """Prompt 7 of task a comes first and is there twice; prompt 7 of task b is another one."""
    traces = make()
    first, second = traces.split()
    assert same(first, traces.pick([0, 1, 3]))
    assert same(second, traces.pick([2, 4]))
    three = replace(traces.pick([0, 2, 3]), prompt=(1, 2, 3))
    assert [half.prompt for half in three.split()] == [(1, 3), (2,)]
    for one in (traces.pick([0, 1]), traces.pick([0, 4]), traces.pick([])):
        with pytest.raises(ValueError, match="too few prompts: at least two of a task are needed"):
            one.split()


def test_joined_traces() -> None:
    traces = make()
    assert same(join([traces.pick([0, 1]), traces.pick([2]), traces.pick([3, 4])]), traces)


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    for sees_path in (True, False):
        traces = make(sees_path)
        traces.save(tmp_path / "t.npz")
        again = Traces.load(tmp_path / "t.npz")
        assert same(traces, again) and again.about == {"seed": 0}


def altered(name: str, at: tuple[int, ...], value: float) -> dict[str, Any]:
    array = getattr(make(), name).copy()
    array[at] = value
    return {name: array}


BROKEN: dict[str, dict[str, Any]] = {
    "a text without tokens": {"n_tokens": np.array([4, 0, 4, 2, 5], np.int32)},
    "tokens that are not there": {"n_tokens": np.array([4, 1, 3, 2, 6], np.int32)},
    "lengths in a table": {"n_tokens": np.array(LENGTHS, np.int32)[:, None]},
    "a task too few": {"task": TASKS[1:]},
    "a prompt too few": {"prompt": PROMPTS[1:]},
    "a signal too few": {"signals": make().signals[:, :2]},
    "no heads": {"ranks": make().ranks[:, :0]},
    "a head too few": {"ranks": make().ranks[:, :2]},
    "ranks of one head": {"ranks": make().ranks[:, 0]},
    "a position too few": {"ranks": make().ranks[1:]},
    "rows of heads that do not see the path": {"sees_path": False},
    "guesses too few": {"log_p": make().log_p[:, :, :7]},
    "a signal that is no number": altered("signals", (2, 1), np.nan),
    "an infinite guess": altered("log_p", (2, 1, 0), -np.inf),
    "a probability above 1": altered("log_p", (2, 1, 0), 0.01),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_parts_that_do_not_fit_together(case: str) -> None:
    make().check("x")
    with pytest.raises(ValueError, match="x: these traces are damaged or of another version"):
        replace(make(), **BROKEN[case]).check("x")


def test_heads_up_to_64() -> None:
    def of(n_heads: int) -> Traces:
        ranks, log_p = np.zeros((15, n_heads), np.int32), np.zeros((15, n_heads, 8), np.float32)
        return replace(make(), ranks=ranks, log_p=log_p, sees_path=False)

    of(1).check("x")
    of(64).check("x")
    with pytest.raises(ValueError, match="damaged"):
        of(65).check("x")


def test_a_file_that_cannot_be_trusted(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    make().save(path)
    good = dict(np.load(path))
    np.savez(path, **good | {"ranks": good["ranks"][1:]})
    with pytest.raises(ValueError, match=r"t\.npz: these traces are damaged"):
        Traces.load(path)
    for name, kind in (
        ("signals", np.complex64),
        ("ranks", np.float32),
        ("n_tokens", "U4"),
        ("sees_path", np.int8),
    ):
        np.savez(path, **good | {name: good[name].astype(kind)})
        with pytest.raises(ValueError, match=rf"t\.npz holds no rank traces: {name} holds values of type"):
            Traces.load(path)
    np.savez(path, **good | {"text": np.frombuffer(b"[" * 100_000, "u1")})
    with pytest.raises(ValueError, match=r"t\.npz holds no rank traces: it is nested too deeply"):
        Traces.load(path)
    np.savez(path, **good | {"ranks": good["ranks"].astype(object)})  # a pickle, which could run anything
    with pytest.raises(ValueError, match=r"t\.npz holds no rank traces: .*pickle"):
        Traces.load(path)


def test_an_archive_packed_in_a_way_that_is_none(tmp_path: Path) -> None:
    """Settings of LZMA that there are not: an error of Python's own, unlike all others of an archive."""
    make().save(path := tmp_path / "t.npz")
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
        begins = [info.header_offset + 30 + len(info.filename) for info in archive.infolist()]
    assert Traces.load(path).task == TASKS
    data = bytearray(path.read_bytes())
    for begin in begins:  # [version: 2][size of the settings: 2][settings]
        data[begin + 4] = 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"t\.npz holds no rank traces: "):
        Traces.load(path)


def test_another_version(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another version"):
        make().check("x", version=2)
    with pytest.raises(ValueError, match=r"none\.npz: No such file"):
        Traces.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.npz holds no rank traces"):
        Traces.load(tmp_path / "text.npz")
