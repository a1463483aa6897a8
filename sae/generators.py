"""Random generators as values: each is a function of (seed, purpose, step) alone.

Nothing here or elsewhere in the package touches torch's global generator, and no generator's state is ever saved: a
resumed run derives the same one again. Cost: a SHA-256 and a generator's seeding, tens of microseconds.
"""

import hashlib

import torch


def generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """Derives the CPU generator for one purpose at one step.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for, such as ``"init"``; distinct purposes give independent streams.
        step: training step, or 0.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
