"""What this process may use of the machine."""

import math
import os
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def cores() -> int:
    """Return how many cores this process may use: those it is pinned to, and no more than a container's share of time."""
    pinned = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (*(_lines(_GROUP / "cpu.max")[:1] or [""])[0].split(), "", "")[:2]
    share = math.ceil(int(quota) / int(period)) if quota.isdigit() and period.isdigit() and int(period) else pinned
    return max(1, min(pinned, share))


def free_memory() -> float:
    """Return the bytes that may still be taken, of the machine and of the container; infinite where neither says."""
    return min(_of_machine(), _of_container())


def _of_machine() -> float:
    lines = _lines(_MEMINFO)
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


def _of_container() -> float:
    """Return what control groups leave: file pages that nobody uses count as free."""
    (limit,), (used,) = (_lines(_GROUP / name)[:1] or [""] for name in ("memory.max", "memory.current"))
    if not limit.isdigit() or not used.isdigit():
        return float("inf")
    idle = sum(int(line.split()[1]) for line in _lines(_GROUP / "memory.stat") if line.startswith("inactive_file "))
    return float(int(limit) - int(used) + idle)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
