"""How many threads a model computes on: as many as the machine has to spare, looked at again while it runs.

The threads of a pass wait for each other after every operation. One that has to share its core with another program
makes all others wait, and they wait by spinning: two threads on two cores beside one busy program are several times
slower than one (docs/threads.md). So a thread is dropped while others use its core, and taken back afterwards.
"""

from __future__ import annotations

import os
import threading
import time

import psutil

INTERVAL = 0.1  # s between two looks: systems count in hundredths
SLACK = 0.65  # of a core that others may use before a thread leaves it
CALM = 0.2  # of a core that they may use when one comes back
LOOKS = 2  # in a row that must find it so

# when each thread of this process last computed with a model that shares: they divide the cores among themselves
_computing: dict[int, float] = {}


class Load:
    """What other programs use of the processors that this process may run on."""

    def __init__(self) -> None:
        cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        self._cpus = sorted(cpus)
        self.n_cpus = len(self._cpus)
        self._last = self._read()

    def _read(self) -> tuple[float, float, float] | None:
        """Seconds: on the clock, that the processors were idle, that this process ran. None: they are not told."""
        try:
            times = psutil.cpu_times(percpu=True)
        except (OSError, RuntimeError, psutil.Error):  # Android hides it, some sandboxes do
            return None
        mine = [times[i] for i in self._cpus if i < len(times)] or times
        return time.perf_counter(), sum(t.idle + getattr(t, "iowait", 0.0) for t in mine), time.process_time()

    def others(self) -> float:
        """Processors that others kept busy since the last call, between 0 and `n_cpus`; 0 where that is not known."""
        before, self._last = self._last, self._read()
        if before is None or self._last is None:
            return 0.0
        passed, idle, own = (b - a for a, b in zip(before, self._last, strict=True))
        if passed <= 0:
            return 0.0
        return min(max(self.n_cpus - (idle + own) / passed, 0.0), float(self.n_cpus))


class Threads:
    """A number of threads that follows the machine.

    Attributes:
        most: the number for an idle machine.
        now: the number at the last look.
    """

    def __init__(self, most: int):
        self.most = self.now = most
        self._load = Load()
        self._looked = time.perf_counter()
        self._calm = 0

    def look(self, who: int | None = None) -> int:
        """The number to compute with now; call it before every pass, it looks at the system ten times a second.

        Args:
            who: threads that take turns at the same passes count as one under this number; None: the calling thread.
        """
        t = time.perf_counter()
        _computing[threading.get_ident() if who is None else who] = t
        if t - self._looked >= INTERVAL:
            self._looked = t
            for ident in [i for i, last in list(_computing.items()) if t - last > 3 * INTERVAL]:
                _computing.pop(ident, None)
            self._settle(self._load.n_cpus - self._load.others(), len(_computing))
        return self.now

    def _settle(self, free: float, n_sharing: int) -> None:
        """Take the number that fits.

        Args:
            free: processors that others leave.
            n_sharing: threads of this process that compute with models, this one among them.
        """
        fits = int((free + SLACK) / n_sharing)
        if fits < self.now:
            self.now, self._calm = max(fits, 1), 0
            return
        more = min(int((free + CALM) / n_sharing), self.most)
        self._calm = self._calm + 1 if more > self.now else 0
        if self._calm >= LOOKS:
            self.now, self._calm = more, 0
