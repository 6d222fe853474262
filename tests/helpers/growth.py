"""Whether a process grows along a run: its memory and its open files, looked at again and again."""

from __future__ import annotations

import statistics
from typing import Any

import psutil


def n_files(process: psutil.Process) -> int:
    """Open files, sockets among them; 0 where the system does not tell."""
    return int(process.num_fds()) if hasattr(process, "num_fds") else 0


class Growth:
    """Samples of a process (None: this one) since it has warmed up."""

    def __init__(self, pid: int | None = None):
        self.process = psutil.Process(pid)
        self.samples: list[tuple[int, int]] = []  # resident bytes, open files

    @property
    def megabytes(self) -> float:
        return float(self.process.memory_info().rss) / 1e6

    def look(self) -> None:
        self.samples.append((self.process.memory_info().rss, n_files(self.process)))

    def figures(self) -> dict[str, Any]:
        """Of the first and of the last fifth of the samples: median memory, how much more that is, most open files."""
        fifth = max(len(self.samples) // 5, 1)
        ends = (self.samples[:fifth], self.samples[-fifth:])
        memory = [statistics.median(rss for rss, _ in part) for part in ends]
        return {
            "memory_mb": [round(m / 1e6, 1) for m in memory], "growth": round(memory[1] / memory[0] - 1, 4),
            "files": [max(n for _, n in part) for part in ends],
        }  # fmt: skip
