"""Permutations as pure functions of (seed, purpose, place), and the transpose shuffle of a window built on them.

A permutation of n things is the sorting order of n random keys. A key's high bits come from Philox, keyed by a sha256
of seed, purpose and place, so any window or epoch can be computed alone; its low bits are the thing's own number. So no
two keys are equal and every correct sort gives the same result, and unlike numpy's ``Generator.permutation``, whose
stream may change between versions, raw Philox output may not. (With n = 2^24 the random part has 40 bits: about one
thing in 10^5 is ordered by number against some other. That is far below what any shuffle statistic can see.)
Cost: one sort of 64-bit integers, about 20 ns a row. Rejected: Feistel networks (nothing to sort, but weak at small n).

The transpose shuffle. A window of P prompts with L positions each goes to L shards of P rows: the positions of each
prompt are permuted, row j of it goes to shard j; then each shard's P rows are permuted. So each shard holds exactly one
row of each prompt, and with the prompts themselves dealt to windows at random, a few chunks drawn from all shards are
nearly an unordered sample of the corpus.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from storage.fingerprint import Json, canonical_json

Indices = npt.NDArray[np.int64]


def random_bits(shape: tuple[int, ...], seed: int, *place: str | int) -> npt.NDArray[np.uint64]:
    """Uniform random 64-bit integers, a pure function of the arguments.

    Args:
        shape: of the result.
        seed: any integer.
        place: what the numbers are for, and where, such as ``("rows", window)``.
    """
    name: Json = [seed, *place]
    digest = hashlib.sha256(canonical_json(name)).digest()
    generator = np.random.Philox(key=np.frombuffer(digest[:16], "<u8"))
    count = int(np.prod(shape, dtype=np.int64))
    return np.asarray(generator.random_raw(count), np.uint64).reshape(shape)


def permutations(shape: tuple[int, ...], seed: int, *place: str | int) -> Indices:
    """Independent uniform permutations of ``range(n)`` along the last axis, n = ``shape[-1]``."""
    n = shape[-1]
    mask = np.uint64((1 << max(n - 1, 1).bit_length()) - 1)
    keys = random_bits(shape, seed, *place)
    keys &= ~mask
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort(axis=-1)
    keys &= mask
    return keys.view(np.int64)


def prompt_order(seed: int, n_prompts: int) -> Indices:
    """The order in which a tokens artifact's training prompts are cut into windows; int64 (n_prompts,)."""
    return permutations((n_prompts,), seed, "prompts")


def window_places(seed: int, window: int, window_prompts: int, positions: int) -> Indices:
    """Where the rows of a window go.

    Returns:
        int64 (window_prompts, positions): the row within the window of prompt p's t-th harvested position. Its quotient
        by ``window_prompts`` is the shard's column, its remainder the row within the shard.
    """
    # Inverses of uniform permutations are uniform permutations: these say directly where a position, or a prompt, goes.
    column = permutations((window_prompts, positions), seed, "positions", window)
    row_in_shard = permutations((positions, window_prompts), seed, "rows", window)
    return column * window_prompts + row_in_shard[column, np.arange(window_prompts)[:, None]]
