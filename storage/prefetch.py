"""An iterator run ahead in a thread of its own, at most a given number of items, and stopped cleanly at any time.

The thread holds no reference to the object that the consumer has, so dropping that object stops the thread too.
Rejected: ``queue.Queue``, whose blocked ``put`` can only be interrupted by draining it.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class _Channel(Generic[T]):
    """Items on their way from the producing thread to the consumer."""

    def __init__(self, depth: int):
        self.depth = depth
        self.items: deque[T] = deque()
        self.changed = threading.Condition()
        self.stopped = False  # the consumer wants no more
        self.ended = False  # the producer has no more
        self.error: BaseException | None = None


class Prefetched(Generic[T], Iterator[T]):
    """Iterates over ``source``, computing up to ``depth`` items ahead in a background thread.

    An exception of the source is raised where its item would have come. :meth:`close`, leaving a ``with`` block, or
    losing the last reference closes the source and joins the thread.

    Args:
        source: what to iterate over; used and closed in the thread only.
        depth: items computed ahead; 0 computes each when asked for, without a thread.
    """

    def __init__(self, source: Generator[T], depth: int):
        self._source = source if depth == 0 else None
        self._channel: _Channel[T] = _Channel(depth)
        self._thread = threading.Thread(target=_produce, args=(source, self._channel), daemon=True)
        if depth > 0:
            self._thread.start()

    def __next__(self) -> T:
        if self._source is not None:
            return next(self._source)
        channel = self._channel
        with channel.changed:
            channel.changed.wait_for(lambda: channel.items or channel.ended or channel.stopped)
            if channel.items:
                item = channel.items.popleft()
                channel.changed.notify_all()
                return item
            error, channel.error = channel.error, None
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stops the thread and frees what the source holds; may be called again."""
        if self._source is not None:
            self._source.close()
            return
        with self._channel.changed:
            self._channel.stopped = True
            self._channel.items.clear()
            self._channel.changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> "Prefetched[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_thread"):
            self.close()


def _produce(source: Generator[object], channel: "_Channel[object]") -> None:
    error: BaseException | None = None
    try:
        for item in source:
            if not _put(channel, item):
                break
    except BaseException as raised:  # noqa: BLE001  (handed to the consumer, who raises it)
        error = raised
    finally:
        try:
            source.close()
        finally:
            with channel.changed:
                channel.ended, channel.error = True, error
                channel.changed.notify_all()


def _put(channel: "_Channel[object]", item: object) -> bool:
    with channel.changed:
        channel.changed.wait_for(lambda: len(channel.items) < channel.depth)
        if channel.stopped:  # close() empties the channel, so that nobody waits here for room
            return False
        channel.items.append(item)
        channel.changed.notify_all()
    return True
