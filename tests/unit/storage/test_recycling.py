import gc
import threading

import numpy as np
import torch

from storage.recycling import Recycled

FLOATS = np.dtype(np.float32)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_the_array_is_gone():
    memory = Recycled(4)
    first = memory.empty((30, 7), FLOATS)
    place = address(first)
    assert first.shape == (30, 7)
    assert first.dtype == FLOATS
    assert first.flags.c_contiguous
    assert first.flags.writeable
    del first
    assert address(memory.empty((10, 21), FLOATS)) == place


def test_memory_in_use_is_never_handed_out_again():
    memory = Recycled(4)
    arrays = [memory.empty((100,), FLOATS) for _ in range(6)]
    for number, array in enumerate(arrays):
        array[:] = number
    assert [set(array.tolist()) for array in arrays] == [{number} for number in range(6)]


def test_a_view_keeps_the_memory():
    memory = Recycled(4)
    array = memory.empty((8, 8), FLOATS)
    array[:] = 1
    view = array[2:][1:].T
    del array
    gc.collect()
    memory.empty((8, 8), FLOATS)[:] = 2
    assert (view == 1).all()


def test_a_tensor_keeps_the_memory():
    memory = Recycled(4)
    array = memory.empty((8, 8), FLOATS)
    array[:] = 1
    tensor = torch.from_numpy(array)[3:]
    del array
    gc.collect()
    memory.empty((8, 8), FLOATS)[:] = 2
    assert bool((tensor == 1).all())


def test_a_larger_array_and_another_dtype_get_memory_that_fits():
    memory = Recycled(4)
    memory.empty((3,), FLOATS)
    larger = memory.empty((5, 100), np.dtype(np.float64))
    larger[:] = 7
    assert larger.shape == (5, 100)
    assert larger.sum() == 3500


def test_no_more_is_kept_than_agreed():
    memory = Recycled(2)
    arrays = [memory.empty((10,), FLOATS) for _ in range(5)]
    arrays.clear()
    assert len(memory._free) == 2


def test_arrays_outlive_where_they_came_from():
    array = Recycled(2).empty((10,), FLOATS)
    array[:] = 3
    gc.collect()
    assert array.sum() == 30


def test_threads_that_drop_and_take_never_share_memory():
    memory, mixed = Recycled(4), []

    def work(number: int) -> None:
        for _ in range(300):
            array = memory.empty((500,), FLOATS)
            array[:] = number
            if (array != number).any():
                mixed.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mixed
