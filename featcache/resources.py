"""What this process may use of the machine, threads that share work, and the C library's allocator for large arrays."""

import ctypes
import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

FETCH = "FEATCACHE_FETCH"  # the environment's say in whether a network is asked: never or allow
_GROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # mallopt(3)
_KEPT = 1 << 30
_LARGEST_FROM_HEAP = 32 << 20  # the greatest value that glibc accepts


def cores() -> int:
    """Return how many cores this process may use: those it is pinned to, and no more than a container's share of time."""
    pinned = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (*(_lines(_GROUP / "cpu.max")[:1] or [""])[0].split(), "", "")[:2]
    share = math.ceil(int(quota) / int(period)) if quota.isdigit() and period.isdigit() and int(period) else pinned
    return max(1, min(pinned, share))


class Threads:
    """As many threads as there are cores, the caller's own among them; NumPy's products run side by side on them.

    The caller takes the first share itself: of two threads that are woken at once the system may put both onto one core,
    where the second waits for the first, which is longer than most products take. Not to be called by its own threads.
    """

    def __init__(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._pool = ThreadPoolExecutor(max(1, cores() - 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown()

    def by_share(self, act: Callable[[Sequence[Item]], Result], items: Sequence[Item], shares: int = 0) -> list[Result]:
        """Call a function with each of so many shares of some items, as many as there are cores if left out."""
        count = max(1, min(shares or cores(), len(items)))
        waiting = [self._pool.submit(act, items[number::count]) for number in range(1, count)]
        return [act(items[::count]), *(share.result() for share in waiting)]

    def map(self, act: Callable[[Item], Result], items: Sequence[Item], shares: int = 0) -> list[Result]:
        """Call a function with each of some items, so many shares side by side."""
        by_share = self.by_share(lambda share: [act(item) for item in share], items, shares)
        results: list[Any] = [None] * len(items)
        for number, share in enumerate(by_share):
            results[number :: len(by_share)] = share
        return results


def may_fetch() -> bool:
    """Tell whether anything may be asked of a network: ``FEATCACHE_FETCH`` is ``allow``, ``never``, or not set.

    Raises:
        UsageError: it is another word.
    """
    word = os.environ.get(FETCH) or "allow"
    if word not in {"allow", "never"}:
        from featcache.errors import UsageError

        raise UsageError(f"{FETCH}={word}: say never or allow.")
    return word == "allow"


def free_memory() -> float:
    """Return the bytes that may still be taken, of the machine and of the container; infinite where neither says."""
    return min(_of_machine(), _of_container())


@cache
def keep_freed_memory() -> None:
    """Let freed memory wait for the next batch instead of going back to the system page by page.

    Page faults cost eager PyTorch up to half its time, and more with several threads. Threads share one heap, so that
    what one frees another can take. Nothing happens where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _LARGEST_FROM_HEAP), (_TRIM_THRESHOLD, _KEPT)):
        mallopt(parameter, value)


@contextmanager
def libraries_load() -> Iterator[None]:
    """Let large libraries be imported without the cyclic garbage collector; afterwards it goes on as it did.

    PyTorch and timm make 900,000 objects that stay: looking through them again and again takes a quarter of their import.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on and not gc.get_freeze_count():  # what a caller has frozen stays so
            # The way there and back makes objects old, without a look at them: as young ones all would be looked through
            # after the next 700, and again after some thousand. With scikit-learn alone that is a quarter of a second.
            gc.freeze()
            gc.unfreeze()
        if was_on:
            gc.enable()


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
