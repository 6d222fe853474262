"""The rooms of the package import downward only: the contracts of import-linter, and that they would be noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.layers import check, install


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return install(tmp_path)


def test_contracts_are_kept(package: Path) -> None:
    done = check(package.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "says"),
    {
        "up": (
            "bank/tree.py",
            "from ..measure import search",
            "entmtp.bank is not allowed to import entmtp.measure",
        ),
        "in a function": (
            "common/cache.py",
            "def f() -> None:\n    from ..llama import Llama",
            "entmtp.common is not allowed to import entmtp.llama",
        ),
        "for types only": (
            "native/decoder.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..options import model",
            "entmtp.native is not allowed to import entmtp.options",
        ),
        "a command by another": (
            "tune/cli.py",
            "from ..bench import cli",
            "entmtp.tune is not allowed to import entmtp.bench",
        ),
        "a circle in a room": (
            "bank/costs.py",
            "from .bank import Bank",
            "No cycles are allowed in entmtp.bank",
        ),
        "the converter by a room below": (
            "measure/search.py",
            "from entmtp.convert import convert",
            "entmtp.measure is not allowed to import entmtp.convert",
        ),
    }.values(),
)
def test_an_import_that_is_turned_round_is_noticed(file: str, line: str, says: str, package: Path) -> None:
    source = package / file
    source.write_text(source.read_text("utf-8") + f"\n{line}\n", "utf-8")
    done = check(package.parent)
    assert done.returncode == 1 and says in done.stdout, done.stdout


def test_a_room_without_a_floor_is_noticed(package: Path) -> None:
    (package / "attic.py").write_text("")
    done = check(package.parent)
    assert done.returncode == 1 and "attic" in done.stdout
