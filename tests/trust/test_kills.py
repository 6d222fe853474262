"""A few kills of every long command; `make kill-matrix KILLS=50` is the long form, and helpers/killing.py the table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from entmtp.common import atomic
from helpers.killing import CASES, run

KILLS, SEED = 3, 1
ROWS = [pytest.param(name, marks=[pytest.mark.torch] if case.torch else []) for name, case in CASES.items()]

pytestmark = pytest.mark.skipif(
    os.name == "nt", reason="Windows cannot kill a process at once as kill -9 does"
)


@pytest.mark.parametrize("name", ROWS)
def test_killed_and_given_again(name: str, tmp_path: Path) -> None:
    row = run(CASES[name], tmp_path, KILLS, SEED)
    assert row.kills + row.completions == KILLS
    assert row.losses == 0
    assert row.litter == []


def test_what_killed_runs_left_goes(tmp_path: Path) -> None:
    target = tmp_path / "heads [1].gguf"
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)

    def left(host: str, pid: int, age: float = 0.0) -> Path:
        path = target.with_name(f".{target.name}.{host}-{pid}-0.tmp")
        path.mkdir() if age else path.write_text("half")
        if age:
            os.utime(path, (0, 0))
        return path

    dead, old = left(atomic._HOST, pid), left("0123abcd", 1, age=1)
    alive, elsewhere = left(atomic._HOST, os.getppid()), left("89abcdef", 1)
    other = tmp_path / f".other.{atomic._HOST}-{pid}-0.tmp"
    other.write_text("of another file")
    with atomic.atomic_path(target) as temporary:
        temporary.write_text("whole")
        assert not dead.exists() and not old.exists()
    assert sorted(tmp_path.iterdir()) == sorted([target, alive, elsewhere, other])
    assert target.read_text() == "whole"
