"""Small activation stores for tests."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage.shards import Layout, WindowBuffer, create_group

ID = "harvest-0123456789ab"

SMALL = Layout(
    n_windows=3,
    window_prompts=32,
    positions=5,
    d_in=6,
    chunk_rows=4,
    encoding="float32",
    seed=7,
    n_prompts=100,
    first_position=1,
)


def activations(layout: Layout) -> npt.NDArray[np.float32]:
    """What the model computes for every token: float32 (n_prompts, first_position + positions, d_in)."""
    rng = np.random.default_rng(11)
    shape = (layout.n_prompts, layout.first_position + layout.positions, layout.d_in)
    return rng.standard_normal(shape).astype(np.float32)


def write_store(folder: Path, layout: Layout = SMALL, windows: Sequence[int] | None = None) -> list[str]:
    """Harvests ``activations(layout)`` into ``folder``, eight prompts at a time; returns the names of all files."""
    names = create_group(folder, layout)
    values = activations(layout)[:, layout.first_position :]
    for window in range(layout.n_windows) if windows is None else windows:
        buffer = WindowBuffer(layout, window)
        for first in range(0, layout.window_prompts, 8):
            buffer.add(first, values[buffer.prompts[first : first + 8]])
        names += buffer.write(folder)
    return names


def encoded_as(encoding: str) -> Layout:
    return replace(SMALL, encoding=encoding)
