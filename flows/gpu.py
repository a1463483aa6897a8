"""One flow run at a time on a GPU, whoever started it.

A worker takes one run at a time, but the run of a worker that was killed lives on, and its successor takes the next.
So a run holds a lock of its GPU, which the kernel frees when the run's process ends, however that ends. Rejected:
Prefect's concurrency limits (a deployment's counts its own runs on all GPUs, and no other deployment's on this one; and
what holds a slot is stopped where the server does not answer); ending such a run (it works, and tells its server so).
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from storage import atomic


def gpu_of(device: str) -> str | None:
    """The UUID of a CUDA device of this machine; None of any other."""
    if not device.startswith("cuda"):
        return None
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


@contextmanager
def alone_on(device: str, folder: Path, on_wait: Callable[[], None]) -> Generator[None]:
    """Holds a device for the ``with`` block, waiting for whoever holds it; the CPU is anybody's.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``...
        folder: where the locks are, made where missing; those who use another know nothing of these.
        on_wait: called once if the GPU is held by another.
    """
    gpu = gpu_of(device)
    if gpu is None:
        yield
        return
    atomic.make_folder(folder)
    with atomic.exclusive_lock(folder / f"gpu-{gpu}.lock", on_wait=on_wait):
        yield
