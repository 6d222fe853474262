"""How many threads a model computes on, and what its passes cost with each number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from . import drafting
from .bank import Bank, Costs
from .common.fork import check_threads
from .common.machine import fast_cores
from .common.use import Use
from .threads import Threads
from .upstream import Upstream

if TYPE_CHECKING:
    from .measure.subject import Subject
    from .native.decoder import Decoder


class Paced(Upstream):
    """A model whose number of threads may follow the machine; `Llama` is one."""

    _decoder: Decoder | None
    _use: Use

    def begin_pace(self, follows: bool) -> dict[str, Any]:
        """Before the model is loaded: arguments of `llama_cpp.Llama`.

        Args:
            follows: the number of threads is to follow the machine.
        """
        self._threads = Threads(fast_cores()) if follows else None
        self._costs: dict[int, Costs] = {}  # measured here, by number of threads
        return dict.fromkeys(("n_threads", "n_threads_batch"), self._threads.most) if self._threads else {}

    def set_threads(self, n_threads: int | None = None) -> None:
        """Compute on so many CPU threads from now on.

        Args:
            n_threads: None: as many as the machine has to spare, looked at again while running.

        Raises:
            ValueError: fewer than one.
        """
        if n_threads is not None and n_threads < 1:
            raise ValueError(f"n_threads is {n_threads}, it must be at least 1")
        with self._use:
            self._threads = Threads(fast_cores()) if n_threads is None else None
            self.compute_on(n_threads or fast_cores())

    def compute_on(self, n_threads: int) -> None:
        """Compute the next passes on so many CPU threads; a number that follows the machine may change again."""
        self.n_threads = self.n_threads_batch = n_threads
        if self._decoder is not None:
            self._decoder.set_threads(n_threads, drafting.costs_for(n_threads, self._costs))

    @property
    def measured_costs(self) -> Costs | None:
        """Of passes on this machine with the present number of threads; None: they were not measured."""
        return drafting.costs_for(self.n_threads, self._costs)

    def follow(self) -> None:
        """Before a pass: the number of threads that the machine has to spare now."""
        if self._threads is not None and (n := self._threads.look()) != self.n_threads:
            self.compute_on(n)
        check_threads(max(self.n_threads, self.n_threads_batch))

    def name_threads(self) -> None:
        """After a policy was set: its costs are of this number of threads."""
        if self._decoder is not None and self.n_threads == self.n_threads_batch:
            self._decoder.set_threads(self.n_threads)

    @contextmanager
    def still(self) -> Iterator[None]:
        """The number of threads stays as it is while something is timed."""
        threads, self._threads = self._threads, None
        try:
            yield
        finally:
            self._threads = threads

    def with_own_costs(self, bank: Bank) -> Bank:
        """The bank with costs of this machine, as measured or remembered."""
        threads = self._threads
        free = threads.look() if threads else None
        self._costs = {}
        with self.still():
            costs = drafting.own_costs(cast("Subject", self), bank, free)
        if not costs:
            return bank
        if threads is not None:
            if free == threads.most:
                threads.most = drafting.fastest(costs)
            threads.now = min(threads.now, threads.most)
            self.compute_on(threads.now)
        self._costs = costs
        return replace(bank, costs=drafting.costs_for(self.n_threads, costs))
