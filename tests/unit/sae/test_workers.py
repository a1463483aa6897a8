import threading

import pytest
import torch

from sae.kernels.workers import Workers


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("blocks", [0, 1, 2, 50])
def test_each_block_runs_once(threads: int, blocks: int):
    done: list[int] = []
    Workers(threads).run(blocks, done.append)
    assert sorted(done) == list(range(blocks))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_block_is_raised_here(threads: int):
    def work(block: int) -> None:
        if block == 4:
            raise ValueError("block 4")

    workers = Workers(threads)
    with pytest.raises(ValueError, match="block 4"):
        workers.run(6, work)
    workers.run(2, lambda _: None)


def test_workers_multiply_alone_and_others_keep_their_threads():
    torch.set_num_threads(before := 2)
    seen: list[int] = []
    meet = threading.Barrier(2)

    def work(block: int) -> None:
        meet.wait(timeout=10)
        seen.append(torch.get_num_threads())

    Workers(2).run(2, work)
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [1, 1]
    assert torch.get_num_threads() == before
    assert later == [before]
