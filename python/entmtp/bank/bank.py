"""Tree banks: JSON files of topologies with what they are expected to accept and what passes cost.

The schema is `trees/bank.schema.json`; `Bank.load` checks every field and says which one is wrong.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.errors import BankError
from ..common.fields import Fields, parse_json
from . import acceptance as proposals
from . import calibration, costs
from .calibration import Calibration
from .costs import Costs
from .tree import PLAIN, Paths, Tree

VERSION = 3
READABLE = (2, VERSION)  # 2: without an acceptance model
MAX_TREES = 64


@dataclass(frozen=True)
class Ladder:
    """Settings of the published policies for one score (see `entmtp_score` in native/include/entmtp.h).

    Attributes:
        edges: bin edges of the score, increasing. [n_trees - 1]
        trees: indices in the bank, one per bin.
    """

    edges: tuple[float, ...]
    trees: tuple[int, ...]


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
        criterion: how the entropy policy weighs tokens against time, `ratio` or `price`.
        costs: what passes and drafts cost on the machine the bank was tuned on.
        calibration: what the heads' probabilities are worth, for the confidence policy.
        acceptance_model: weights that the acceptance model of the auto policy begins with, [N_SETS][N_INPUTS] as in
            bank/acceptance.py; None: the library's.
        published: settings of the published policies, by score.
        report: what the tuner found, for people and plots.
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
    criterion: str = "ratio"
    costs: Costs | None = None
    calibration: Calibration | None = None
    acceptance_model: proposals.Weights | None = None
    published: dict[str, Ladder] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def expected(self) -> npt.NDArray[np.float64]:
        """Expected accepted guesses per step, [n_bins, n_trees]."""
        if self.acceptance is None:
            raise BankError(
                f"bank {self.name} has no calibration: policy entropy cannot choose from it, use policy static"
            )
        return np.array([[sum(nodes) for nodes in trees] for trees in self.acceptance])

    def need_costs(self) -> Costs:
        """The bank's costs.

        Raises:
            BankError: it has none.
        """
        if self.costs is None:
            raise BankError(
                f"bank {self.name} has no costs: only policy static can use it; entmtp tune makes a bank with"
            )
        return self.costs

    @property
    def is_for_auto(self) -> bool:
        """It holds no trees to choose from, only what the policy auto begins with: tuned for a model without heads."""
        return self.acceptance is None and self.acceptance_model is not None

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
        kept = {t.paths: i for i, t in enumerate(trees)}
        published = {
            score: Ladder(ladder.edges, tuple(kept[self.trees[i].pruned(depth).paths] for i in ladder.trees))
            for score, ladder in self.published.items()
        }
        return replace(self, trees=trees, acceptance=acceptance, published=published)

    @staticmethod
    def without_heads() -> Bank:
        """For a model without heads: trees are grown from the text. Costs are a curve of SmolLM2-135M-Instruct on two
        cores (docs/kernels.md), until this machine's are known."""
        curve = {1: 1.0, 2: 1.16, 3: 1.30, 4: 1.38, 6: 1.70, 8: 2.3, 16: 3.8, 32: 7.2, 64: 14.0}
        return Bank("text", (PLAIN,), costs=costs.relative(curve, (0.0,)))

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
            data = parse_json(text)
        except ValueError as e:
            raise BankError(f"{label} is not JSON: {e}") from None
        return from_json(data, label)


def load_bank(trees: str | Path | Bank) -> tuple[Bank, str | None]:
    """A bank and the name of one tree of it, from `bank`, `bank:tree` or a Bank.

    Raises:
        BankError: see `Bank.load`.
    """
    if isinstance(trees, Bank):
        return trees, None
    if isinstance(trees, Path) or Path(trees).exists():
        return Bank.load(trees), None
    name, _, tree = str(trees).rpartition(":")
    if name and "/" not in tree and "\\" not in tree:
        return Bank.load(name), tree
    return Bank.load(trees), None


def _folder() -> Any:
    return files("entmtp") / "trees"


def names() -> list[str]:
    """Names of the banks that come with the package."""
    return sorted(
        f.name.removesuffix(".json")
        for f in _folder().iterdir()
        if f.name.endswith(".json") and not f.name.endswith(".schema.json")
    )


def from_json(data: Any, label: str) -> Bank:
    """A bank from the parsed JSON of its file.

    Raises:
        BankError: names the field that breaks the schema.
    """
    f = Fields(data, label)
    f.only({"version", *Bank.__dataclass_fields__})
    if f.data.get("version") not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise BankError(
            f"bank {label}: field version is {f.data.get('version')!r}, this entmtp reads versions {known}"
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

    criterion = f.data.get("criterion", "ratio")
    if criterion not in ("ratio", "price"):
        raise f.fail("criterion", "ratio or price")
    report = f.data.get("report", {})
    if not isinstance(report, dict):
        raise f.fail("report", "an object")

    return Bank(
        name=f.text("name", label),
        trees=tuple(trees),
        source=f.text("source", ""),
        task=f.text("task"),
        heads=f.text("heads"),
        device=f.text("device"),
        ema_window=f.number("ema_window", f.data.get("ema_window", 8.0), 1.0, 1e6),
        bin_edges=edges,
        acceptance=acceptance,
        criterion=criterion,
        costs=costs.from_json(f.data["costs"], label) if f.data.get("costs") is not None else None,
        calibration=calibration.from_json(f.data["calibration"], label)
        if f.data.get("calibration") is not None
        else None,
        acceptance_model=proposals.from_json(f.data["acceptance_model"], label)
        if f.data.get("acceptance_model") is not None
        else None,
        published=_published(f, len(trees)),
        report=report,
    )


def _published(f: Fields, n_trees: int) -> dict[str, Ladder]:
    raw = f.data.get("published", {})
    if not isinstance(raw, dict) or not set(raw) <= {"entropy", "top1", "path"}:
        raise f.fail("published", "an object with ladders by score: entropy, top1, path")
    result = {}
    for score, ladder in raw.items():
        key = f"published.{score}"
        if not isinstance(ladder, dict) or set(ladder) != {"edges", "trees"}:
            raise f.fail(key, "an object with edges and trees")
        indices = ladder["trees"]
        if (
            not isinstance(indices, list)
            or not all(type(i) is int and 0 <= i < n_trees for i in indices)
            or not indices
        ):
            raise f.fail(f"{key}.trees", f"a list of indices below {n_trees}")
        edges = f.numbers(f"{key}.edges", ladder["edges"], 0.0, n=len(indices) - 1)
        if any(b <= a for a, b in pairwise(edges)):
            raise f.fail(f"{key}.edges", "increasing")
        result[score] = Ladder(edges, tuple(indices))
    return result


def _acceptance(f: Fields, b: int, row: Any, trees: list[Tree]) -> tuple[tuple[float, ...], ...]:
    if not isinstance(row, list) or len(row) != len(trees):
        raise f.fail(f"acceptance[{b}]", f"a list of {len(trees)} trees")
    result = []
    for i, (nodes, tree) in enumerate(zip(row, trees, strict=True)):
        result.append(f.numbers(f"acceptance[{b}][{i}]", nodes, 0.0, 1.0, n=len(tree.paths)))
    return tuple(result)


def to_json(bank: Bank) -> dict[str, Any]:
    """The JSON object that `from_json` reads."""
    data: dict[str, Any] = {"version": VERSION, "name": bank.name, "source": bank.source}
    for key in ("task", "heads", "device"):
        if getattr(bank, key) is not None:
            data[key] = getattr(bank, key)
    data["trees"] = [{"name": t.name, "paths": [list(p) for p in t.paths]} for t in bank.trees]
    if bank.acceptance is not None:
        data |= {
            "ema_window": bank.ema_window,
            "bin_edges": list(bank.bin_edges),
            "criterion": bank.criterion,
        }
        data["acceptance"] = [[list(nodes) for nodes in trees] for trees in bank.acceptance]
    if bank.costs is not None:
        data["costs"] = bank.costs.to_json()
    if bank.calibration is not None:
        data["calibration"] = bank.calibration.to_json()
    if bank.acceptance_model is not None:
        data["acceptance_model"] = proposals.to_json(bank.acceptance_model)
    if bank.published:
        data["published"] = {
            k: {"edges": list(v.edges), "trees": list(v.trees)} for k, v in bank.published.items()
        }
    if bank.report:
        data["report"] = bank.report
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
