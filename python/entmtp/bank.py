"""Tree banks: JSON files of topologies with what they are expected to accept and to cost.

The schema is `trees/bank.schema.json`; `Bank.load` checks every field and says which one is wrong.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import BankError

VERSION = 1
MAX_NODES = 512  # larger trees pay on no machine; a bound for untrusted files
MAX_TREES = 64

Paths = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Tree:
    """A topology in the notation of Medusa and Hydra: `(0, 1)` is the second guess below the first guess.

    Attributes:
        name: how people call it.
        paths: rank paths of the nodes below the root, breadth first. Empty: plain decoding.
    """

    name: str
    paths: Paths

    @staticmethod
    def from_paths(name: str, paths: Any) -> Tree:
        """Check rank paths, and bring them in breadth-first order.

        Raises:
            BankError: a path is malformed, there twice, or its parent is missing.
        """
        if not isinstance(paths, list | tuple):
            raise BankError(f"tree {name}: paths must be a list of rank paths such as [[0], [0, 0], [1]]")
        if len(paths) >= MAX_NODES:
            raise BankError(f"tree {name}: {len(paths) + 1} nodes are more than {MAX_NODES}")
        seen: set[tuple[int, ...]] = set()
        for path in paths:
            if (
                not isinstance(path, list | tuple)
                or not path
                or not all(type(r) is int and 0 <= r < 1000 for r in path)
            ):
                raise BankError(f"tree {name}: {path!r} is not a rank path such as [0, 2, 1]")
            if tuple(path) in seen:
                raise BankError(f"tree {name}: path {list(path)} is there twice")
            seen.add(tuple(path))
        for path in seen:
            if len(path) > 1 and path[:-1] not in seen:
                raise BankError(f"tree {name}: path {list(path)} has no parent {list(path[:-1])}")
        return Tree(name, tuple(sorted(seen, key=lambda p: (len(p), p))))

    @property
    def n_nodes(self) -> int:
        """Tokens in a verify pass, the root among them."""
        return len(self.paths) + 1

    @property
    def max_depth(self) -> int:
        return max((len(p) for p in self.paths), default=0)

    @property
    def parent(self) -> list[int]:
        """Parent index per node, [n_nodes]; -1 for the root."""
        index = {(): 0, **{p: i + 1 for i, p in enumerate(self.paths)}}
        return [-1] + [index[p[:-1]] for p in self.paths]

    @property
    def rank(self) -> list[int]:
        """Rank among the parent's guesses per node, [n_nodes]; 0 for the root."""
        return [0] + [p[-1] for p in self.paths]

    def pruned(self, depth: int) -> Tree:
        """Without the nodes deeper than `depth`."""
        return Tree(self.name, tuple(p for p in self.paths if len(p) <= depth))


PLAIN = Tree("plain", ())


@dataclass(frozen=True)
class Bank:
    """Trees to choose from, the first of them plain decoding.

    Attributes:
        name: file name or title.
        trees: topologies.
        source: where the trees come from.
        ema_window: window of the entropy estimate, tokens.
        bin_edges: inner edges of the entropy bins, nats, increasing. [n_bins - 1]
        acceptance: per bin and tree, the probability that each node is accepted, [n_bins][n_trees][n_nodes - 1];
            None for a bank without calibration (static trees).
        verify_cost: measured cost of a pass per number of nodes, relative to one node. {n_nodes: cost}
        draft_cost: cost of drafting to each depth, relative to a pass of one node. [max depth + 1], 0 for depth 0
    """

    name: str
    trees: tuple[Tree, ...]
    source: str = ""
    task: str | None = None
    heads: str | None = None
    device: str | None = None
    ema_window: float = 8.0
    bin_edges: tuple[float, ...] = ()
    acceptance: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    verify_cost: dict[int, float] = field(default_factory=dict)
    draft_cost: tuple[float, ...] = ()

    def expected(self) -> npt.NDArray[np.float64]:
        """Expected accepted guesses per step, [n_bins, n_trees]."""
        if self.acceptance is None:
            raise BankError(
                f"bank {self.name} has no calibration: policy entropy cannot choose from it, use policy static"
            )
        return np.array([[sum(nodes) for nodes in trees] for trees in self.acceptance])

    def step_costs(self) -> npt.NDArray[np.float64]:
        """Cost of a step with each tree relative to plain decoding, [n_trees]; interpolated between measured sizes."""
        if not self.verify_cost:
            raise BankError(
                f"bank {self.name} has no costs: policy entropy cannot choose from it, use policy static"
            )
        sizes = sorted(self.verify_cost)
        verify = np.interp([t.n_nodes for t in self.trees], sizes, [self.verify_cost[n] for n in sizes])
        last = self.draft_cost[-1] if self.draft_cost else 0.0
        draft = [
            self.draft_cost[t.max_depth] if t.max_depth < len(self.draft_cost) else last * t.max_depth
            for t in self.trees
        ]
        return verify + np.array(draft)

    def index(self, tree: str) -> int:
        """Index of the tree called `tree`.

        Raises:
            BankError: there is none; the text lists those there are.
        """
        for i, t in enumerate(self.trees):
            if t.name == tree:
                return i
        names = ", ".join(t.name for t in self.trees)
        raise BankError(f"bank {self.name} has no tree {tree}; it has {names}")

    def pruned(self, depth: int) -> Bank:
        """Without nodes deeper than `depth`, for models with fewer heads; trees that become equal are kept once."""
        keep: dict[Paths, int] = {}
        for i, tree in enumerate(self.trees):
            keep.setdefault(tree.pruned(depth).paths, i)
        acceptance = None
        if self.acceptance is not None:
            acceptance = tuple(
                tuple(
                    tuple(
                        p
                        for p, path in zip(by_tree[i], self.trees[i].paths, strict=True)
                        if len(path) <= depth
                    )
                    for i in keep.values()
                )
                for by_tree in self.acceptance
            )
        trees = tuple(self.trees[i].pruned(depth) for i in keep.values())
        return Bank(**{**self.__dict__, "trees": trees, "acceptance": acceptance})

    @staticmethod
    def load(name_or_path: str | Path) -> Bank:
        """Read a bank by path, or by its name under `trees/`.

        Raises:
            BankError: the file is missing or breaks the schema; the text names the field.
        """
        path = Path(name_or_path)
        if path.suffix != ".json" and not path.exists():
            resource = _folder() / f"{name_or_path}.json"
            if not resource.is_file():
                raise BankError(
                    f"there is no tree bank {name_or_path}: give a path, or one of {', '.join(names())}"
                )
            text, label = resource.read_text("utf-8"), str(name_or_path)
        else:
            try:
                if path.stat().st_size > 64 << 20:
                    raise BankError(f"{path} is larger than 64 MB: not a tree bank")
                text, label = path.read_text("utf-8"), str(path)
            except (OSError, UnicodeDecodeError) as e:
                reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
                raise BankError(f"cannot read tree bank {path}: {reason}") from None
        try:
            return from_json(json.loads(text), label)
        except (json.JSONDecodeError, RecursionError) as e:
            raise BankError(f"{label} is not JSON: {e}") from None


def _folder() -> Any:
    return files(__package__) / "trees"


def names() -> list[str]:
    """Names of the banks that come with the package."""
    return sorted(
        f.name.removesuffix(".json")
        for f in _folder().iterdir()
        if f.name.endswith(".json") and not f.name.endswith(".schema.json")
    )


class _Fields:
    """Reads fields of a JSON object, each checked; every error names the bank and the field."""

    def __init__(self, data: Any, label: str):
        if not isinstance(data, dict):
            raise BankError(f"bank {label}: the file must hold a JSON object")
        self.data, self.label = data, label

    def fail(self, key: str, expected: str) -> BankError:
        return BankError(f"bank {self.label}: field {key} must be {expected}")

    def text(self, key: str, default: Any = None) -> Any:
        value = self.data.get(key, default)
        if value is not None and not isinstance(value, str):
            raise self.fail(key, "a string")
        return value

    def number(self, key: str, value: Any, low: float) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or value < low
        ):
            raise self.fail(key, f"a number not below {low:g}")
        return float(value)

    def numbers(self, key: str, value: Any, low: float, n: int | None = None) -> tuple[float, ...]:
        if not isinstance(value, list) or (n is not None and len(value) != n):
            raise self.fail(key, "a list of numbers" + ("" if n is None else f" of length {n}"))
        return tuple(self.number(f"{key}[{i}]", x, low) for i, x in enumerate(value))


def from_json(data: Any, label: str) -> Bank:
    """A bank from the parsed JSON of its file.

    Raises:
        BankError: names the field that breaks the schema.
    """
    f = _Fields(data, label)
    known = {
        "version", "name", "source", "task", "heads", "device", "ema_window",
        "bin_edges", "trees", "acceptance", "verify_cost", "draft_cost",
    }  # fmt: skip
    if unknown := sorted(set(f.data) - known):
        raise BankError(f"bank {label}: unknown field {unknown[0]}")
    if f.data.get("version") != VERSION:
        raise BankError(
            f"bank {label}: field version is {f.data.get('version')!r}, this entmtp reads version {VERSION}"
        )

    raw = f.data.get("trees")
    if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_TREES:
        raise f.fail("trees", f"a list of 1 to {MAX_TREES} trees")
    trees = []
    for i, t in enumerate(raw):
        if not isinstance(t, dict) or not isinstance(t.get("name"), str) or set(t) != {"name", "paths"}:
            raise f.fail(f"trees[{i}]", "an object with name and paths")
        trees.append(Tree.from_paths(t["name"], t["paths"]))
        if "acceptance" in f.data and [tuple(p) for p in t["paths"]] != list(trees[-1].paths):
            raise f.fail(f"trees[{i}].paths", "in breadth-first order, as acceptance is given per node")
    if trees[0].paths:
        raise f.fail("trees[0]", "plain decoding: a tree without paths")
    if len({t.name for t in trees}) != len(trees):
        raise f.fail("trees", "trees of different names")

    edges = f.numbers("bin_edges", f.data.get("bin_edges", []), 0.0)
    if any(b <= a for a, b in pairwise(edges)):
        raise f.fail("bin_edges", "increasing")

    acceptance = None
    if (rows := f.data.get("acceptance")) is not None:
        if not isinstance(rows, list) or len(rows) != len(edges) + 1:
            raise f.fail("acceptance", f"a list of {len(edges) + 1} entropy bins, one more than bin_edges")
        acceptance = tuple(_acceptance(f, b, row, trees) for b, row in enumerate(rows))

    costs = f.data.get("verify_cost", {})
    if not isinstance(costs, dict) or not all(k.isdecimal() and 0 < int(k) <= MAX_NODES for k in costs):
        raise f.fail("verify_cost", "an object from numbers of nodes to relative costs")
    verify = {int(k): f.number(f"verify_cost.{k}", v, 1e-6) for k, v in costs.items()}

    return Bank(
        name=f.text("name", label),
        trees=tuple(trees),
        source=f.text("source", ""),
        task=f.text("task"),
        heads=f.text("heads"),
        device=f.text("device"),
        ema_window=f.number("ema_window", f.data.get("ema_window", 8.0), 1.0),
        bin_edges=edges,
        acceptance=acceptance,
        verify_cost=verify,
        draft_cost=f.numbers("draft_cost", f.data.get("draft_cost", []), 0.0),
    )


def _acceptance(f: _Fields, b: int, row: Any, trees: list[Tree]) -> tuple[tuple[float, ...], ...]:
    if not isinstance(row, list) or len(row) != len(trees):
        raise f.fail(f"acceptance[{b}]", f"a list of {len(trees)} trees")
    result = []
    for i, (nodes, tree) in enumerate(zip(row, trees, strict=True)):
        values = f.numbers(f"acceptance[{b}][{i}]", nodes, 0.0, n=len(tree.paths))
        if any(v > 1.0 for v in values):
            raise f.fail(f"acceptance[{b}][{i}]", "probabilities between 0 and 1")
        result.append(values)
    return tuple(result)


def to_json(bank: Bank) -> dict[str, Any]:
    """The JSON object that `from_json` reads."""
    data: dict[str, Any] = {"version": VERSION, "name": bank.name, "source": bank.source}
    for key in ("task", "heads", "device"):
        if getattr(bank, key) is not None:
            data[key] = getattr(bank, key)
    data["trees"] = [{"name": t.name, "paths": [list(p) for p in t.paths]} for t in bank.trees]
    if bank.acceptance is not None:
        data |= {"ema_window": bank.ema_window, "bin_edges": list(bank.bin_edges)}
        data["acceptance"] = [[list(nodes) for nodes in trees] for trees in bank.acceptance]
        data["verify_cost"] = {str(k): v for k, v in sorted(bank.verify_cost.items())}
        data["draft_cost"] = list(bank.draft_cost)
    return data


def dumps(bank: Bank) -> str:
    """The text of a bank's file: lists of numbers and of paths on one line each."""
    text = json.dumps(to_json(bank), indent=1)
    for _ in range(2):  # numbers, then lists of them
        text = re.sub(
            r"\[\s+((?:[^\[\]{}]|\[[^\[\]{}]*\])*?)\s+\]",
            lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]",
            text,
        )
    return text + "\n"
