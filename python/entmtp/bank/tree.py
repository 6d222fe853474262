"""Topologies: the tree of guesses that one pass verifies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..common.errors import BankError

MAX_NODES = 512  # larger trees pay on no machine; a bound for untrusted files
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
