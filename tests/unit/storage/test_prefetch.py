import gc
import threading
from collections.abc import Generator

import pytest

from storage.prefetch import Prefetched


class Source:
    """Counts what it was asked for, and notes when it was closed."""

    def __init__(self, count: int, error_at: int | None = None):
        self.made = 0
        self.closed = threading.Event()
        self.items = self._generate(count, error_at)

    def _generate(self, count: int, error_at: int | None) -> Generator[int]:
        try:
            for i in range(count):
                if i == error_at:
                    raise RuntimeError("stop")
                self.made += 1
                yield i
        finally:
            self.closed.set()


def other_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.daemon and "_produce" in thread.name]


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_items_come_in_order_whatever_the_depth(depth: int):
    source = Source(20)
    assert list(Prefetched(source.items, depth)) == list(range(20))
    assert source.closed.wait(10)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_exception_comes_where_its_item_would_have(depth: int):
    items = Prefetched(Source(20, error_at=5).items, depth)
    assert [next(items) for _ in range(5)] == list(range(5))
    with pytest.raises(RuntimeError, match="stop"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_no_more_than_depth_items_wait_and_one_is_held():
    source = Source(100)
    with Prefetched(source.items, 3) as items:
        next(items)
        assert source.made <= 5
    assert source.made < 100


@pytest.mark.parametrize("taken", [0, 1, 10])
@pytest.mark.parametrize("depth", [1, 4])
def test_close_stops_the_thread_and_closes_the_source(depth: int, taken: int):
    source = Source(1000)
    items = Prefetched(source.items, depth)
    for _ in range(taken):
        next(items)
    items.close()
    assert source.closed.is_set() or source.made == 0
    assert not other_threads()
    with pytest.raises(StopIteration):
        next(items)
    items.close()


def test_close_without_a_thread_closes_the_source():
    source = Source(10)
    items = Prefetched(source.items, 0)
    next(items)
    items.close()
    assert source.closed.is_set()


def test_losing_the_last_reference_stops_the_thread():
    source = Source(1000)
    items = Prefetched(source.items, 2)
    next(items)
    del items
    gc.collect()
    assert source.closed.wait(10)
    assert not other_threads()
