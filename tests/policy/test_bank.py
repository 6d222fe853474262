"""Tree banks: what is valid loads and means what it says, everything else is refused by the name of its field."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entmtp.bank import acceptance
from entmtp.bank.acceptance import N_INPUTS, N_SETS, SETS
from entmtp.bank.bank import Bank, dumps, from_json, load_bank, names, to_json
from entmtp.bank.tree import PLAIN, Tree
from entmtp.common.errors import BankError

GOOD: dict[str, Any] = {
    "version": 2,
    "name": "good",
    "trees": [
        {"name": "plain", "paths": []},
        {"name": "a", "paths": [[0], [1], [0, 0]]},
        {"name": "b", "paths": [[0]]},
    ],
    "ema_window": 8,
    "bin_edges": [0.5],
    "acceptance": [[[], [0.6, 0.2, 0.3], [0.6]], [[], [0.4, 0.1, 0.1], [0.4]]],
    "criterion": "price",
    "costs": {
        "verify": {"64": {"1": 100.0, "2": 120.0, "4": 200.0}},
        "chain": [0.0, 10.0, 20.0],
        "level": [[10.0, 10.0, 10.0], [10.0, 10.0, 10.0]],
        "context": 64,
    },
    "published": {"entropy": {"edges": [0.5, 1.0], "trees": [1, 2, 0]}},
    "report": {"front": [[1, 1.0, 100.0]]},
}


@st.composite
def rank_paths(draw: st.DrawFn) -> list[list[int]]:
    """Random trees as rank paths, in random order."""
    paths: list[list[int]] = []
    for _ in range(draw(st.integers(0, 20))):
        parent = draw(st.sampled_from([[], *paths]))
        path = [*parent, draw(st.integers(0, 5))]
        if path not in paths and len(path) < 7:
            paths.append(path)
    return draw(st.permutations(paths))


@given(rank_paths())
@settings(derandomize=True, deadline=None)
def test_trees_keep_their_paths_and_come_breadth_first(paths: list[list[int]]) -> None:
    tree = Tree.from_paths("t", paths)
    assert sorted(map(list, tree.paths)) == sorted(paths)
    assert tree.n_nodes == len(paths) + 1
    depths = [len(p) for p in tree.paths]
    assert depths == sorted(depths)
    # walking up from a node spells its path backwards
    for i in range(1, tree.n_nodes):
        ranks, node = [], i
        while node > 0:
            ranks.append(tree.rank[node])
            assert tree.parent[node] < node
            node = tree.parent[node]
        assert tuple(reversed(ranks)) == tree.paths[i - 1]


def test_round_trip() -> None:
    bank = from_json(GOOD, "x")
    assert from_json(to_json(bank), "x") == bank
    assert from_json(json.loads(dumps(bank)), "x") == bank
    assert bank.expected().tolist() == [[0.0, pytest.approx(1.1), 0.6], [0.0, pytest.approx(0.6), 0.4]]
    assert [bank.need_costs().step(t) for t in bank.trees] == pytest.approx([100, 220, 130])


def test_weights_of_the_acceptance_model() -> None:
    weights = {name: [0.5 * i + j for j in range(N_INPUTS)] for i, name in enumerate(SETS[1:])}
    bank = from_json(GOOD | {"version": 3, "acceptance_model": weights}, "x")
    assert bank.acceptance_model is not None
    assert bank.acceptance_model[SETS.index("text+heads")][3] == weights["text+heads"][3]
    assert from_json(json.loads(dumps(bank)), "x") == bank
    # files of before have none, and are written anew with the version of now
    old = from_json(GOOD, "x")
    assert old.acceptance_model is None and to_json(old)["version"] == 3
    for wrong in (
        {**weights, "text": [1.0]},
        {**weights, "text": ["x"] * N_INPUTS},
        {**weights, "text": [1e9] * N_INPUTS},
    ):
        with pytest.raises(BankError, match="acceptance model in bank x: field text"):
            from_json(GOOD | {"acceptance_model": wrong}, "x")
    with pytest.raises(BankError, match="unknown field magic"):
        from_json(GOOD | {"acceptance_model": weights | {"magic": [0.0] * N_INPUTS}}, "x")
    del weights["model"]
    with pytest.raises(BankError, match="field model"):
        from_json(GOOD | {"acceptance_model": weights}, "x")


def test_weights_as_rows() -> None:
    """A row for each set of drafters, by their bits; a file holds four digits, and nothing of the empty set."""
    assert (SETS[0b0101], SETS[0b1000], len(SETS)) == ("text+heads", "model", 16)
    rows = np.arange(N_SETS * N_INPUTS, dtype=np.float32).reshape(N_SETS, N_INPUTS) / 10 + np.float32(1 / 3)
    weights = acceptance.of_array(rows)
    assert weights[1][0] == 1.8333
    data = acceptance.to_json(weights)
    assert list(data) == list(SETS[1:]) and data["recycling"] == list(weights[2])
    back = acceptance.from_json(data, "x")
    assert back[1:] == weights[1:] and back[0] == (0.0,) * N_INPUTS
    assert acceptance.as_array(back).dtype == np.float32
    assert np.array_equal(acceptance.as_array(back), np.array(back, np.float32))


def test_a_bank_of_no_trees() -> None:
    """Without heads trees are grown; the curve is that of docs/kernels.md, relative to a pass of one token."""
    bank = Bank.without_heads()
    assert bank.trees == (PLAIN,) and not bank.is_for_auto
    curve = bank.need_costs().curve() / 1000
    assert curve[[0, 1, 2, 3, 5, 7, 15, 31, 63]] == pytest.approx(
        [1, 1.16, 1.3, 1.38, 1.7, 2.3, 3.8, 7.2, 14]
    )
    weights = acceptance.from_json({name: [0.0] * N_INPUTS for name in SETS[1:]}, "x")
    assert replace(bank, acceptance_model=weights).is_for_auto
    assert not replace(from_json(GOOD, "x"), acceptance_model=weights).is_for_auto


def test_a_file_is_for_people_too() -> None:
    """Numbers, paths and their lists on one line; what there is nothing to say of is left out."""
    assert (
        dumps(Bank("tiny", (PLAIN, Tree.from_paths("a", [[0], [1], [0, 0]])), "here"))
        == """\
{
 "version": 3,
 "name": "tiny",
 "source": "here",
 "trees": [
  {
   "name": "plain",
   "paths": []
  },
  {
   "name": "a",
   "paths": [[0], [1], [0, 0]]
  }
 ]
}
"""
    )
    text = dumps(from_json(GOOD, "x"))
    assert '\n  "chain": [0.0, 10.0, 20.0],\n' in text
    assert '"level": [[10.0, 10.0, 10.0], [10.0, 10.0, 10.0]]' in text
    named = replace(from_json(GOOD, "x"), task="t", heads="h", device="d")
    assert [to_json(named)[key] for key in ("task", "heads", "device")] == ["t", "h", "d"]
    assert from_json(to_json(named), "x") == named


def test_what_a_file_leaves_out() -> None:
    bank = from_json({"version": 2, "trees": [{"name": "plain", "paths": []}]}, "x")
    assert bank == Bank("x", (PLAIN,))
    assert (bank.ema_window, bank.criterion, bank.bin_edges) == (8.0, "ratio", ())
    with pytest.raises(BankError, match=r"field trees\[0\] must be plain decoding: a tree without paths"):
        from_json({"version": 2, "trees": [{"name": "a", "paths": [[0]]}]}, "x")
    with pytest.raises(BankError, match="bank x has no costs: only policy static"):
        bank.need_costs()
    with pytest.raises(BankError, match="bank x has no calibration"):
        bank.expected()


def test_trees_by_name(tmp_path: Path) -> None:
    bank = from_json(GOOD, "x")
    assert [bank.index(name) for name in ("plain", "a", "b")] == [0, 1, 2]
    with pytest.raises(BankError, match="bank good has no tree c; it has plain, a, b"):
        bank.index("c")

    path = tmp_path / "a:b.json"  # a file's name may hold a colon
    path.write_text(dumps(bank))
    for there in (path, str(path), bank):
        assert load_bank(there) == (bank, None)
    (tmp_path / "good.json").write_text(dumps(bank))
    assert load_bank(f"{tmp_path}/good.json:b") == (bank, "b")
    assert load_bank("mc_sim_7b_63:b") == (Bank.load("mc_sim_7b_63"), "b")
    assert load_bank("mc_sim_7b_63") == (Bank.load("mc_sim_7b_63"), None)
    for missing in ("c:/trees/good.json", "c:\\trees\\good.json", tmp_path / "x:y"):
        with pytest.raises(BankError, match=r"good\.json: No such file|no tree bank .*x:y"):
            load_bank(missing)


def test_as_many_trees_as_a_bank_may_hold() -> None:
    def of(n: int) -> dict[str, Any]:
        return {"version": 2, "trees": [{"name": str(i), "paths": [[i]] if i else []} for i in range(n)]}

    assert len(from_json(of(1), "x").trees) == 1
    assert len(from_json(of(64), "x").trees) == 64
    with pytest.raises(BankError, match="trees must be a list of 1 to 64 trees"):
        from_json(of(65), "x")


def test_as_many_nodes_and_ranks_as_a_tree_may_hold() -> None:
    assert Tree.from_paths("t", [[i] for i in range(511)]).n_nodes == 512
    with pytest.raises(BankError, match="513 nodes are more than 512"):
        Tree.from_paths("t", [[i] for i in range(512)])
    assert Tree.from_paths("t", [[999]]).rank == [0, 999]
    with pytest.raises(BankError, match="rank path"):
        Tree.from_paths("t", [[1000]])


def test_pruning_drops_deep_nodes_and_what_becomes_equal() -> None:
    data = copy.deepcopy(GOOD)
    data["trees"][2]["paths"] = [[0], [1]]
    data["acceptance"][0][2] = [0.6, 0.2]
    data["acceptance"][1][2] = [0.4, 0.1]
    bank = from_json(data, "x").pruned(1)
    assert [t.paths for t in bank.trees] == [(), ((0,), (1,))]
    assert bank.expected().tolist() == [[0.0, 0.8], [0.0, 0.5]]
    assert Bank("x", (PLAIN, Tree.from_paths("a", [[0], [0, 0]]))).pruned(1).trees[1].paths == ((0,),)


BROKEN = {
    "version": (lambda d: d.update(version=1), "version"),
    "no version": (lambda d: d.pop("version"), "version"),
    "unknown field": (lambda d: d.update(colour="red"), "colour"),
    "no trees": (lambda d: d.update(trees=[]), "trees"),
    "tree no object": (lambda d: d["trees"].__setitem__(1, 3), r"trees\[1\] must be an object"),
    "tree without name": (lambda d: d["trees"][1].pop("name"), r"trees\[1\] must be an object"),
    "tree with more": (lambda d: d["trees"][1].update(x=1), r"trees\[1\] must be an object"),
    "trees no list": (lambda d: d.update(trees={"a": 1}), "trees"),
    "first tree not plain": (lambda d: d["trees"].pop(0), "acceptance|trees\\[0\\]"),
    "same names": (lambda d: d["trees"][2].update(name="a"), "different names"),
    "orphan": (lambda d: d["trees"][1].update(paths=[[0], [1], [2, 0]]), "no parent"),
    "twice": (lambda d: d["trees"][1].update(paths=[[0], [0], [0, 0]]), "twice"),
    "negative rank": (lambda d: d["trees"][1].update(paths=[[0], [-1], [0, 0]]), "rank path"),
    "text rank": (lambda d: d["trees"][1].update(paths=[[0], ["1"], [0, 0]]), "rank path"),
    "bool rank": (lambda d: d["trees"][1].update(paths=[[0], [True], [0, 0]]), "rank path"),
    "empty path": (lambda d: d["trees"][1].update(paths=[[], [1], [0, 0]]), "rank path"),
    "too many nodes": (lambda d: d["trees"][1].update(paths=[[i] for i in range(600)]), "601 nodes"),
    "not breadth first": (lambda d: d["trees"][1].update(paths=[[0], [0, 0], [1]]), "breadth-first"),
    "edges fall": (
        lambda d: d.update(bin_edges=[1.0, 0.5], acceptance=GOOD["acceptance"] + [GOOD["acceptance"][0]]),
        "increasing",
    ),
    "edges equal": (
        lambda d: d.update(bin_edges=[0.5, 0.5], acceptance=GOOD["acceptance"] + [GOOD["acceptance"][0]]),
        "increasing",
    ),
    "edges text": (lambda d: d.update(bin_edges=["1"]), "bin_edges"),
    "edge beyond all floats": (lambda d: d.update(bin_edges=[10**400]), "bin_edges"),
    "edge nan": (lambda d: d.update(bin_edges=[float("nan")]), "bin_edges"),
    "a bin is missing": (lambda d: d["acceptance"].pop(), "acceptance"),
    "a tree is missing": (lambda d: d["acceptance"][0].pop(), "acceptance\\[0\\]"),
    "a node is missing": (lambda d: d["acceptance"][0][1].pop(), "acceptance\\[0\\]\\[1\\]"),
    "probability above 1": (lambda d: d["acceptance"][0].__setitem__(2, [1.5]), "between 0 and 1"),
    "window": (lambda d: d.update(ema_window=0), "ema_window"),
    "costs": (lambda d: d.update(costs=[1]), "costs"),
    "cost zero": (lambda d: d["costs"]["verify"]["64"].update({"1": 0}), "verify.64.1"),
    "criterion": (lambda d: d.update(criterion="luck"), "criterion"),
    "calibration": (lambda d: d.update(calibration={"accept": 1}), "calibration"),
    "calibration beyond all floats": (
        lambda d: d.update(calibration={"accept": [[10**400] * 9]}),
        "field accept must be a table",
    ),
    "report": (lambda d: d.update(report=[]), "report"),
    "score": (lambda d: d.update(published={"luck": {}}), "published"),
    "published no object": (lambda d: d.update(published=["entropy"]), "published must be an object"),
    "ladder": (lambda d: d["published"]["entropy"].pop("edges"), "published.entropy"),
    "ladder edges": (lambda d: d["published"]["entropy"].update(edges=[1.0, 0.5]), "published.entropy.edges"),
    "ladder edges equal": (
        lambda d: d["published"]["entropy"].update(edges=[0.5, 0.5]),
        "published.entropy.edges",
    ),
    "ladder without trees": (
        lambda d: d["published"]["entropy"].update(edges=[], trees=[]),
        "published.entropy.trees",
    ),
    "negative ladder tree": (
        lambda d: d["published"]["entropy"].update(trees=[-1, 1, 2]),
        "published.entropy.trees",
    ),
    "ladder trees": (lambda d: d["published"]["entropy"].update(trees=[0, 1, 3]), "published.entropy.trees"),
    "name": (lambda d: d.update(name=3), "name"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_every_broken_field_is_named(case: str) -> None:
    data = copy.deepcopy(GOOD)
    change, match = BROKEN[case]
    change(data)
    with pytest.raises(BankError, match=match):
        from_json(data, "x")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not JSON"), ("[1, 2", "is not JSON"), ("[" * 100_000, "is not JSON: it is nested too deeply"),
        ("9" * 5000, "is not JSON"), ('"\\ud800"', "is not JSON: it has half of a surrogate pair"),
        ("[]", "expected a JSON object"), ("3", "expected a JSON object"), ('"x"', "expected a JSON object"),
    ],
    ids=lambda t: t[:8] or "empty",
)  # fmt: skip
def test_files_that_are_no_banks(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "bank.json"
    path.write_text(text)
    with pytest.raises(BankError, match=rf"bank\.json:? {match}"):
        Bank.load(path)


def test_missing_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="cannot read"):
        Bank.load(tmp_path / "none.json")
    with pytest.raises(BankError, match="mc_sim_7b_63"):
        Bank.load("no-such-bank")
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(BankError, match=r"large\.json is larger than 64 MB"):
        Bank.load(tmp_path / "large.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BankError, match="UTF-8"):
        Bank.load(tmp_path / "binary.json")


def test_banks_that_come_along() -> None:
    for name in names():
        bank = Bank.load(name)
        assert bank.source, name
        if name.startswith("generic-"):
            assert bank.need_costs().key is None and bank.calibration is not None
            assert set(bank.published) == {"entropy", "top1", "path"}
            assert bank.expected().shape == (len(bank.bin_edges) + 1, len(bank.trees))
            assert [t.n_nodes for t in bank.trees] == [1, 2, 4, 8, 16, 32]
        elif name.startswith("demo-"):
            _, arch, task = name.split("-")
            assert bank.task == task and bank.heads is not None and arch in bank.heads
            assert len(bank.trees) <= 8 and bank.calibration is not None and bank.report["held_out"]
        else:
            assert [t.n_nodes for t in bank.trees] == [1, 64]
            with pytest.raises(BankError, match="no calibration"):
                bank.expected()


def test_schema_file_lists_the_fields_that_the_reader_knows() -> None:
    from importlib.resources import files

    schema = json.loads((files("entmtp") / "trees" / "bank.schema.json").read_text())
    generic = to_json(Bank.load("generic-hydra"))
    assert set(schema["properties"]) == set(generic) | {"task", "acceptance_model"}
    assert set(schema["properties"]["acceptance_model"]["required"]) == set(SETS[1:])
    for part in ("costs", "calibration"):
        usual = {"key", "build"} if part == "costs" else set()  # that costs of no known machine leave out
        assert set(schema["properties"][part]["properties"]) == set(generic[part]) | usual


def test_pruned_ladders_still_point_to_their_trees() -> None:
    data = copy.deepcopy(GOOD)
    data["trees"][2]["paths"] = [[0], [1]]
    data["acceptance"][0][2] = [0.6, 0.2]
    data["acceptance"][1][2] = [0.4, 0.1]
    bank = from_json(data, "x").pruned(1)
    assert bank.published["entropy"].trees == (1, 1, 0)
