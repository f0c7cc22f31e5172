"""Threads that share work: nothing is lost or out of order, whatever the number of cores."""

import threading
from collections.abc import Sequence

import pytest

from featcache import resources
from featcache.resources import Threads


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [0, 1, 2, 7, 20])
def test_results_come_in_the_order_of_the_items(count: int, items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each item is taken once, in as many shares as there are cores or items."""
    monkeypatch.setattr(resources, "cores", lambda: count)
    with Threads() as threads:
        assert threads.map(lambda item: item**2, range(items)) == [item**2 for item in range(items)]
        shares = threads.by_share(list, range(items))

    assert sorted(item for share in shares for item in share) == list(range(items))
    assert len(shares) == max(1, min(count, items))


def test_the_caller_takes_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that of two cores one thread is to be woken, which goes to the other one."""
    monkeypatch.setattr(resources, "cores", lambda: 2)
    meet = threading.Barrier(2, timeout=30)

    def thread_of(_: Sequence[int]) -> int:
        meet.wait()
        return threading.get_ident()

    with Threads() as threads:
        here, there = threads.by_share(thread_of, [0, 1])
        assert threads.by_share(lambda _: threading.get_ident(), [0, 1], 1) == [here]

    assert here == threading.get_ident() != there


def test_what_a_thread_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the caller's share and of another's."""
    monkeypatch.setattr(resources, "cores", lambda: 2)
    with Threads() as threads:
        for item in (0, 1):
            with pytest.raises(ZeroDivisionError):
                threads.map(lambda number, at=item: 1 // (number - at), range(2))
