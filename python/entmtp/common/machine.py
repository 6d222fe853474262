"""What machine this is, for tables and caches."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil


def cpu_name() -> str:
    """What the operating system calls the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _numbers(text: str) -> set[int]:
    """Of a list as Linux writes it: 0-3,8."""
    ranges = (part.partition("-") for part in text.strip().split(",") if part.strip())
    return {i for first, _, last in ranges for i in range(int(first), int(last or first) + 1)}


def _fast_of_linux(cpus: set[int], devices: Path) -> int:
    """Cores among `cpus`, of the fastest kind where there are several."""
    try:  # Intel's hybrids
        fast = _numbers((devices / "cpu_core/cpus").read_text()) & cpus
    except (OSError, ValueError):
        fast = set()
    cores: dict[str, float] = {}  # by the processors that are threads of it
    for cpu in fast or cpus:
        folder = devices / f"system/cpu/cpu{cpu}"
        try:
            core = (folder / "topology/thread_siblings_list").read_text().strip()
        except OSError:
            core = str(cpu)
        try:  # Arm's: relative to the fastest, which is 1024
            capacity = float((folder / "cpu_capacity").read_text())
        except (OSError, ValueError):
            capacity = 1.0
        cores[core] = max(capacity, cores.get(core, 0.0))
    # a core that is little slower than the fastest keeps step with it
    return sum(capacity >= 0.75 * max(cores.values()) for capacity in cores.values())


def fast_cores(devices: Path = Path("/sys/devices")) -> int:
    """Cores worth a thread of their own: that this process may run on, have time granted, and are of the fast kind.

    Args:
        devices: Linux's tree of devices.
    """
    usable = usable_cpus()
    if sys.platform == "linux":
        n = _fast_of_linux(os.sched_getaffinity(0), devices)
    else:
        n = _performance_cores() or psutil.cpu_count(logical=False) or usable
    quota = cpu_quota()
    return max(min(n, usable, int(quota) if quota else usable), 1)


def _performance_cores() -> int | None:
    """Fast cores of a Mac; None on other systems."""
    if sys.platform != "darwin":
        return None
    try:
        asked = ["sysctl", "-n", "hw.perflevel0.physicalcpu"]
        return int(subprocess.run(asked, capture_output=True, text=True, check=True, timeout=5).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):  # one kind of core alone
        return None


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Processors' worth of time that a container grants (cgroup v2); None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no cgroup, or "max"
        return None


def free_memory() -> int | None:
    """Bytes of memory that programs can still get; None where the system does not say."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit, used = (Path(f"/sys/fs/cgroup/memory.{n}").read_text().strip() for n in ("max", "current"))
        if limit != "max":
            found.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return min(found) if found else None


def held_memory() -> dict[str, int]:
    """Bytes of this process that are in memory, "Rss", and of them in large pages, "AnonHugePages"; empty where the
    system does not say."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    rows = (line.split() for line in lines)
    return {name.rstrip(":"): int(kb) * 1024 for name, kb, *_ in rows}


def peak_memory_mb() -> float | None:
    """Largest resident size of this process, MB; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
