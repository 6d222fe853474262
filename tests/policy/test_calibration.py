"""The tables of the confidence policy as files: shapes and limits, and the paths that levels are expanded along."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from entmtp.bank.calibration import WIDTH, expanded_parent, expanded_path, from_json
from entmtp.common.errors import BankError


def good(n_heads: int = 2, n_bins: int = 3, n_scenarios: int = 2) -> dict[str, Any]:
    """Tables of a few heads, every number another one."""

    def table(*shape: int) -> Any:
        return np.round(np.linspace(0.01, 0.99, int(np.prod(shape))).reshape(shape), 3).tolist()

    return {
        "hits": 0.5123, "hits_window": 39.0, "accept": table(n_heads, 9), "ahead": table(n_heads, 7),
        "edges": table(n_heads, n_bins - 1), "scenarios": table(n_heads, n_bins, n_scenarios, n_heads, 3),
    }  # fmt: skip


def test_round_trip() -> None:
    data = good()
    tables = from_json(copy.deepcopy(data), "x")
    assert tables.to_json() == data and tables.n_levels == 2
    for key in ("accept", "ahead", "edges", "scenarios"):
        assert getattr(tables, key).tolist() == data[key]
    # rounded to what it says something about
    data["accept"][0][0], data["hits"] = 0.123456, 0.512345
    data["ahead"][0][0] = data["edges"][0][0] = 0.123456
    data["scenarios"][0][0][0][0][0] = 0.12345
    again = from_json(data, "x").to_json()
    assert (again["accept"][0][0], again["hits"]) == (0.1235, 0.5123)
    assert again["ahead"][0][0] == again["edges"][0][0] == 0.1235
    assert again["scenarios"][0][0][0][0][0] == 0.123


def test_one_bin_has_no_edges() -> None:
    data = good(n_bins=1)
    assert data["edges"] == [[], []]
    assert from_json(data, "x").edges.shape == (2, 0)


def test_as_many_heads_bins_and_scenarios_as_there_may_be() -> None:
    for data in (good(64, 1, 1), good(1, 64, 1), good(1, 1, 64)):
        assert from_json(data, "x").n_levels in (1, 64)
    with pytest.raises(BankError, match="field accept must be a table for 1 to 64 heads"):
        from_json(good(65, 1, 1), "x")
    for data in (good(1, 65, 1), good(1, 1, 65)):
        with pytest.raises(
            BankError, match="field scenarios must be a table of at most 64 bins and 64 scenarios"
        ):
            from_json(data, "x")


def broken(key: str, value: Any, *at: int) -> dict[str, Any]:
    data = good()
    place = data[key]
    for i in at[:-1]:
        place = place[i]
    place[at[-1]] = value
    return data


@pytest.mark.parametrize(
    ("key", "shape", "limits"),
    [
        ("accept", "any x 9", "-1000 and 1000"), ("ahead", "2 x 7", "-1000 and 1000"),
        ("edges", "2 x any", "0 and 1"), ("scenarios", "2 x 3 x any x 2 x 3", "0 and 1"),
    ],
)  # fmt: skip
def test_tables_are_told_their_shape_and_limits(key: str, shape: str, limits: str) -> None:
    told = f"calibration in bank x: field {key} must be a table of {shape} numbers between {limits}$"
    at = (0, 0) if key != "scenarios" else (0, 0, 0, 0, 0)
    low, high = (float(x) for x in limits.split(" and "))
    with pytest.raises(BankError, match=told):
        from_json(good() | {key: 1.0}, "x")
    for value in (low - 0.01, high + 0.01, float("nan"), "text"):
        with pytest.raises(BankError, match=told):
            from_json(broken(key, value, *at), "x")
    if key in ("accept", "ahead", "scenarios"):
        for value in (low, high):
            from_json(broken(key, value, *at), "x")


def test_edges_increase() -> None:
    for second in (0.2, 0.1):
        with pytest.raises(BankError, match=r"field edges\[1\] must be increasing"):
            from_json(good() | {"edges": [[0.0, 1.0], [0.2, second]]}, "x")


def test_no_heads() -> None:
    with pytest.raises(BankError, match="accept"):
        from_json(good() | {"accept": [], "edges": []}, "x")
    with pytest.raises(BankError, match="accept must be a table for 1 to 64 heads"):
        from_json(good() | {"accept": np.zeros((0, 9))}, "x")


def test_paths_that_levels_are_expanded_along() -> None:
    """The likely ones, by hand: the best guess everywhere, then one second guess, and once a third."""
    paths = [[expanded_path(level, i) for i in range(WIDTH)] for level in range(1, 4)]
    assert paths[0] == [(0,), (1,), (2,), (3,)]
    assert paths[1] == [(0, 0), (1, 0), (0, 1), (2, 0)]
    assert paths[2] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    parents = [[expanded_parent(level, i) for i in range(WIDTH)] for level in range(1, 4)]
    assert parents == [[0, 0, 0, 0], [0, 1, 0, 2], [0, 1, 2, 0]]
