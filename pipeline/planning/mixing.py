"""How well a planned run's batches would be mixed, measured on prompt numbers alone, before anything is computed.

The measure is the store's certificate (``storage.certificate``): same-prompt pairs of a batch over what a uniform
shuffle of the corpus would have. Three ways to feed the same training stand side by side: the store; training live from
the model; and the published run's buffer, refilled when half used, without its bug.

Each is measured over an epoch of as many rows as are cheap. The store's ratio is the same at any size. Of a buffer of m
rows it is the *pairs* that stay the same at any size much larger than m, while a uniform shuffle has ever fewer, so its
ratio grows with the corpus: it is scaled by the rows.
"""

from collections.abc import Generator
from dataclasses import replace
from itertools import count

import numpy as np
import numpy.typing as npt

from pipeline.planning.sizes import Figures, Subject, planned_batches
from storage.certificate import Certificate, certify, measure
from storage.errors import ConfigError
from storage.shuffle import permutations

_STORE_ROWS = 4_000_000
_REFILLS = 8


class Mixing(Figures):
    """The mixing of one source of batches."""

    source: str
    """What it is."""
    pair_ratio: float
    """Same-prompt pairs over a uniform shuffle's, at the run's number of rows."""
    full_pair_ratio: float
    """The same at the full run's."""
    standard_error: float
    """Of ``pair_ratio``."""
    distinct_prompts: float
    """Distinct prompts of a full batch, mean; 0 where no batch was full."""
    batches: int
    """Batches measured."""
    rows: int
    """Rows of the corpus they were measured on."""


def mixings(subject: Subject, full_rows: int) -> list[Mixing]:
    """Measures each source at the preset's batch and pool; a pool too small for live training leaves that out.

    Args:
        subject: what is planned.
        full_rows: rows of the full run.
    """
    layout, order = subject.layouts[0], subject.order
    windows = max(1, min(layout.n_windows, _STORE_ROWS // layout.window_rows))
    store = certify(planned_batches(replace(layout, n_windows=windows)), order)
    found = [_mixing("store", store, grows=False, rows=layout.n_rows, full_rows=full_rows)]
    rows = subject.prompts.train_prompts * layout.positions
    prompts = min(subject.prompts.train_prompts, _REFILLS * order.pool_rows // layout.positions)
    try:
        live = certify(subject.live_chunks(prompts).batches(), order)
        found.append(_mixing("live", live, grows=True, rows=rows, full_rows=full_rows))
    except ConfigError:  # fewer than 20 model batches: training would refuse it, too
        pass
    published = measure(
        half_refilled(prompts, layout.positions, order.pool_rows, order.batch_rows),
        order=order,
        n_rows=prompts * layout.positions,
        positions=layout.positions,
    )
    return [*found, _mixing("half-refilled buffer", published, grows=True, rows=rows, full_rows=full_rows)]


def half_refilled(
    n_prompts: int, positions: int, pool_rows: int, batch_rows: int, *, seed: int = 0
) -> Generator[npt.NDArray[np.int64]]:
    """Prompt numbers of the batches of the published buffer, as designed: shuffled whole, half used, refilled.

    Args:
        n_prompts: prompts, in an order of their own.
        positions: rows a prompt.
        pool_rows: rows of the buffer.
        batch_rows: rows a batch; what no longer fills a batch is left out.
        seed: of the shuffles.
    """
    rows = np.repeat(np.arange(n_prompts), positions)
    half = max(batch_rows, pool_rows // 2 // batch_rows * batch_rows)
    buffer, waiting = rows[: 2 * half], rows[2 * half :]
    for refill in count():
        buffer = buffer[permutations((len(buffer),), seed, "half-refilled", refill)]
        used = half if len(waiting) else len(buffer)
        for start in range(0, used - batch_rows + 1, batch_rows):
            yield buffer[start : start + batch_rows]
        if not len(waiting):
            return
        buffer, waiting = np.concatenate([buffer[used:], waiting[:half]]), waiting[half:]


def _mixing(source: str, found: Certificate, *, grows: bool, rows: int, full_rows: int) -> Mixing:
    def at(n_rows: int) -> float:
        return (n_rows - 1) / (found.n_rows - 1) if grows else 1.0

    return Mixing(
        source=source,
        pair_ratio=found.pair_ratio * at(rows),
        full_pair_ratio=found.pair_ratio * at(full_rows),
        standard_error=found.standard_error * at(rows),
        distinct_prompts=found.distinct_prompts,
        batches=found.batches,
        rows=found.n_rows,
    )
