"""The C library's allocator, set up for large arrays that come and go with every batch."""

import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # mallopt(3)
_KEPT = 1 << 30
_LARGEST_FROM_HEAP = 32 << 20  # the greatest value that glibc accepts


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
