"""Tables of what steps cost: read back as they were, and interpolated sensibly."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from entmtp.bank.costs import Costs, from_json, relative
from entmtp.bank.tree import PLAIN, Tree
from entmtp.common.errors import BankError

GOOD: dict[str, Any] = {
    "verify": {"64": {"1": 100.0, "2": 130.0, "4": 200.0}, "512": {"1": 200.0, "2": 260.0, "4": 400.0}},
    "chain": [0.0, 10.0, 30.0],
    "level": [[10.0, 12.0, 20.0], [20.0, 22.0, 30.0]],
    "sample": 5.0,
    "host": 2.0,
    "token": 20.0,
    "context": 64,
    "spread": 0.05,
    "key": "abc",
}


def test_round_trip() -> None:
    c = from_json(GOOD, "x")
    assert from_json(json.loads(json.dumps(c.to_json())), "x") == c
    assert json.loads(json.dumps(c.to_json())) == GOOD


def test_curves_between_sizes_and_depths() -> None:
    c = from_json(GOOD, "x")
    assert c.curve()[[0, 1, 2, 3]] == pytest.approx([100, 130, 165, 200])
    # 64 reads 256 rows of the cache and 512 reads 768; on average 128 more than the depth
    assert c.curve(512 - 128)[[0, 3]] == pytest.approx([150, 300])
    assert c.curve(1280 - 128)[0] == pytest.approx(300)  # and on beyond the last one
    assert c.curve()[4] == pytest.approx(235)  # the last slope goes on
    assert (np.diff(c.curve()) > 0).all()
    deeper = replace(c, verify=c.verify | {1024: {1: 300.0, 64: 600.0}})
    assert deeper.curve(512 - 128)[0] == pytest.approx(150)  # between the two around, not the last two
    # 1024 reads 1280 rows: half way from the 768 of 512
    assert deeper.curve(1024 - 128)[0] == pytest.approx(250)
    assert deeper.curve(1280 - 128)[63] == pytest.approx(600)
    assert len(c.curve()) == 64


def test_a_curve_of_one_depth_and_one_size() -> None:
    assert relative({1: 2.0}, [0.0]).curve().tolist() == [2000.0] * 64
    assert relative({1: 1.0, 64: 64.0}, [0.0]).curve() == pytest.approx(1000 * np.arange(1, 65))
    assert relative({1: 1.0, 2: 2.0}, [0.0]).curve() == pytest.approx(1000 * np.arange(1, 65))
    # falling costs do not fall below nothing
    assert relative({1: 9.0, 2: 1.0}, [0.0]).curve()[1:].tolist() == [1000.0] * 63


def test_trees_larger_than_the_table_cost_in_proportion() -> None:
    c = relative({1: 1.0, 64: 8.0}, [0.0, 0.5])
    assert c.step(Tree.from_paths("t", [[i] for i in range(63)])) == pytest.approx(8000 + 500)
    assert c.step(Tree.from_paths("t", [[i] for i in range(127)])) == pytest.approx(16000 + 500)


def test_drafts_by_depth_and_width() -> None:
    c = from_json(GOOD, "x")
    assert c.draft(PLAIN) == 0.0
    assert (
        c.draft(Tree.from_paths("t", [[0], [1], [2]])) == 10.0
    )  # one path is expanded, however many guesses it has
    assert c.draft(Tree.from_paths("t", [[0], [0, 0]])) == 30.0
    two = Tree.from_paths("t", [[0], [1], [0, 0], [1, 0]])
    assert c.draft(two) == 32.0
    assert c.step(two) == pytest.approx(235 + 32)
    wide = Tree.from_paths("t", [[r] for r in range(6)] + [[r, 0] for r in range(6)])
    assert c.draft(wide) == pytest.approx(30 + (30 - 20) + 2 * (30 - 22) / 2)
    four = Tree.from_paths("t", [[r] for r in range(4)] + [[r, 0] for r in range(4)])
    assert c.draft(four) == pytest.approx(30 + (30 - 20))
    five = Tree.from_paths("t", [[r] for r in range(5)] + [[r, 0] for r in range(5)])
    assert c.draft(five) == pytest.approx(30 + (30 - 20) + (30 - 22) / 2)
    assert Costs({0: {1: 1.0}}, (0.0,), ()).draft(PLAIN) == 0.0
    with pytest.raises(BankError, match="tree t is 3 deep, but only 2 heads were timed"):
        c.draft(Tree.from_paths("t", [[0], [0, 0], [0, 0, 0]]))


def test_relative_costs() -> None:
    c = relative({1: 1.0, 4: 2.0}, [0.0, 0.1, 0.3])
    assert c.curve()[:4] / 1000 == pytest.approx([1, 4 / 3, 5 / 3, 2])
    assert c.draft(Tree.from_paths("t", [[0], [0, 0]])) == pytest.approx(300)
    assert np.array(c.level) == pytest.approx(np.array([[100.0] * 3, [200.0] * 3]))


def test_costs_times_a_factor() -> None:
    """What depends on the model is scaled; what a token costs beside its pass is not."""
    c = replace(from_json(GOOD, "x"), build=8.0)
    half = c.scaled(0.5)
    assert half.curve() == pytest.approx(c.curve() / 2) and half.curve(1000) == pytest.approx(
        c.curve(1000) / 2
    )
    assert half.chain == pytest.approx(np.array(c.chain) / 2)
    assert np.array(half.level) == pytest.approx(np.array(c.level) / 2)
    assert (half.sample, half.host, half.token, half.build, half.context) == (5.0, 2.0, 20.0, 4.0, 64)
    assert half.key is None  # of no machine
    assert c.to_json()["build"] == 8.0 and from_json(c.to_json(), "x") == c


def test_what_costs_leave_out() -> None:
    few = {"verify": {"0": {"1": 1.0}}, "chain": [0.0], "level": []}
    assert from_json(few, "x") == Costs({0: {1: 1.0}}, (0.0,), ())
    assert from_json(few, "x").context == 256
    assert from_json(few | {"context": 0}, "x").context == 0


def test_how_deep_and_wide_costs_may_be_tabulated() -> None:
    def of(depth: int, size: int, n_heads: int = 0) -> dict[str, Any]:
        rows = [[1.0] * 3] * n_heads
        return {
            "verify": {str(depth): {"1": 1.0, str(size): 1.0}},
            "chain": [0.0] * (n_heads + 1),
            "level": rows,
        }

    assert from_json(of(1 << 24, 512, 64), "x").verify == {1 << 24: {1: 1.0, 512: 1.0}}
    for field, wrong in (("verify", of((1 << 24) + 1, 2)), ("chain", of(0, 2, 65))):
        with pytest.raises(BankError, match=f"field {field} must be"):
            from_json(wrong, "x")
    for size in (0, 513):
        with pytest.raises(BankError, match=r"field verify\.0 must be"):
            from_json(of(0, size), "x")


BROKEN = {
    "unknown field": (lambda d: d.update(colour=1), "colour"),
    "no verify": (lambda d: d.pop("verify"), "verify"),
    "verify empty": (lambda d: d.update(verify={}), "verify"),
    "depth no number": (lambda d: d.update(verify={"x": {"1": 1.0}}), "verify"),
    "no cost of one token": (lambda d: d.update(verify={"64": {"2": 1.0}}), "verify.64"),
    "size no number": (lambda d: d["verify"]["64"].update({"two": 1.0}), "verify.64"),
    "depth of 5000 digits": (lambda d: d.update(verify={"9" * 5000: {"1": 1.0}}), "verify"),
    "size of 5000 digits": (lambda d: d["verify"]["64"].update({"9" * 5000: 1.0}), "verify.64"),
    "size in other digits": (lambda d: d["verify"]["64"].update({"\u0664": 1.0}), "verify.64"),
    "cost zero": (lambda d: d["verify"]["64"].update({"2": 0}), "verify.64.2"),
    "cost nan": (lambda d: d["verify"]["64"].update({"2": float("nan")}), "verify.64.2"),
    "cost beyond all machines": (lambda d: d["verify"]["64"].update({"2": 1e308}), "verify.64.2"),
    "draft beyond all machines": (lambda d: d["level"][0].__setitem__(0, 1e13), r"level\[0\]\[0\]"),
    "context too deep": (lambda d: d.update(context=1e300), "context"),
    "chain": (lambda d: d.update(chain=[1.0, 2.0, 3.0]), "chain"),
    "level missing": (lambda d: d["level"].pop(), "level"),
    "level width": (lambda d: d["level"][0].pop(), r"level\[0\]"),
    "negative": (lambda d: d.update(sample=-1), "sample"),
    "text": (lambda d: d.update(token="x"), "token"),
    "key": (lambda d: d.update(key=5), "key"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_every_broken_field_is_named(case: str) -> None:
    data = copy.deepcopy(GOOD)
    change, match = BROKEN[case]
    change(data)
    with pytest.raises(BankError, match=match):
        from_json(data, "x")


def test_a_level_that_was_timed_cheaper_with_more_paths() -> None:
    """A busy machine times such things; a bank of them must load, so no draft may cost less than nothing."""
    costs = Costs(verify={64: {1: 100.0}}, chain=(0.0, 20.0), level=((90.0, 40.0, 10.0),))
    for width in (1, 2, 3, 4, 9):
        assert costs.draft_of_widths((width,)) == 20.0
