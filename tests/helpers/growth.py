"""Whether a process grows along a run: its memory and its open files, looked at again and again."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
from typing import Any

import psutil


def n_files(process: psutil.Process) -> int:
    """Open files, sockets among them; 0 where the system does not tell."""
    return int(process.num_fds()) if hasattr(process, "num_fds") else 0


def give_back() -> None:
    """What is freed goes back to the system, where malloc (glibc's) would keep it for later."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class Growth:
    """Samples of a process (None: this one)."""

    def __init__(self, pid: int | None = None):
        self.process = psutil.Process(pid)
        self.samples: list[tuple[float, int, int]] = []  # how far the run was, resident bytes, open files

    @property
    def megabytes(self) -> float:
        return float(self.process.memory_info().rss) / 1e6

    def look(self, at: float) -> None:
        self.samples.append((at, self.process.memory_info().rss, n_files(self.process)))

    def figures(self, since: float) -> dict[str, Any]:
        """Of the first and of the last fifth of the samples since then: median memory, its growth, most open files."""
        samples = [s for s in self.samples if s[0] >= since]
        fifth = max(len(samples) // 5, 1)
        ends = (samples[:fifth], samples[-fifth:])
        memory = [statistics.median(rss for _, rss, _ in part) for part in ends]
        return {
            "memory_mb": [round(m / 1e6, 1) for m in memory], "growth": round(memory[1] / memory[0] - 1, 4),
            "files": [max(n for _, _, n in part) for part in ends],
        }  # fmt: skip
