"""A few threads that share a list of blocks: for work that leaves Python's lock (compiled kernels, torch products).

Blocks are handed out as threads become free, so a slow block or a busy core does not hold the others up; callers write
blocks so that neither order nor thread matters. Each worker multiplies matrices on itself alone.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Barrier

import torch


class Workers:
    """A pool of threads; one thread means the caller's own, and no pool."""

    def __init__(self, threads: int) -> None:
        """Starts the threads.

        Args:
            threads: at least 1.
        """
        self.threads = threads
        self._pool = None if threads == 1 else _single_threaded_pool(threads)

    def run(self, blocks: int, work: Callable[[int], None]) -> None:
        """Calls work(0..blocks - 1), each once, on any thread; an exception in one is raised here."""
        if self._pool is None or blocks == 1:
            for block in range(blocks):
                work(block)
            return
        numbers = count()  # its next() is atomic

        def take_blocks() -> None:
            while (block := next(numbers)) < blocks:
                work(block)

        for running in [self._pool.submit(take_blocks) for _ in range(min(self.threads, blocks))]:
            running.result()


def _single_threaded_pool(threads: int) -> ThreadPoolExecutor:
    """Starts threads in which torch's operations use one core.

    torch.set_num_threads acts on the calling thread, and also becomes the default of threads started later, which is
    put back.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="sparse-step")
    all_started = Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes on the default at its first look, so look before it is put back
        all_started.wait()

    started = [pool.submit(start) for _ in range(threads)]
    all_started.wait()
    for thread in started:
        thread.result()
    torch.set_num_threads(before)
    return pool
