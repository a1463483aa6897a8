"""Large arrays whose memory is used again as soon as nobody refers to it.

Memory fresh from the kernel comes a page at a time, zeroed, and is given back page by page: for a batch of 4096 rows of
2048 float32 that takes longer than decoding into it. The array handed out has for its base an object that puts the
memory back when the last array or tensor over it is gone, so nobody can be left with memory that is written again.
Rejected: a weak reference to the array itself (a view of it may live longer), and a ring of buffers (the consumer would
have to say, or the documentation to warn, how long a batch stays valid).
"""

from collections import deque
from math import prod

import numpy as np
import numpy.typing as npt

Memory = npt.NDArray[np.uint8]


class Recycled:
    """Hands out arrays; any thread may drop them.

    Args:
        keep: how many arrays' memory is kept at most while nobody has it.
    """

    def __init__(self, keep: int):
        self._free: deque[Memory] = deque(maxlen=keep)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
        """An array like :func:`numpy.empty`'s."""
        n_bytes = prod(shape) * dtype.itemsize
        memory = self._free.pop() if self._free else None  # the last one back, as it may still be in a cache
        if memory is None or len(memory) < n_bytes:
            memory = np.empty(n_bytes, np.uint8)
        return np.asarray(_Loan(memory, self._free))[:n_bytes].view(dtype).reshape(shape)


class _Loan:
    """Owns memory for as long as some array has it for its base."""

    def __init__(self, memory: Memory, home: deque[Memory]):
        self.__array_interface__ = memory.__array_interface__
        self._memory = memory
        self._home = home

    def __del__(self) -> None:
        self._home.append(self._memory)
