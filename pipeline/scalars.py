"""A training's metrics for TensorBoard, beside the training log that every artifact has.

Event files carry the clock, so they lie where the user says and are no part of the artifact. A resumed training goes
on in the same folder; steps that it takes again are written again, with the same values. The writer is torch's own and
wants the extra ``tensorboard``.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from storage.errors import ConfigError

Write = Callable[[Mapping[str, Any]], None]
_SKIPPED = {"step", "engine"}


def scalar_writer(folder: Path | None, run: str) -> Write:
    """A function that writes one row of a training log; it does nothing where there is no folder.

    Args:
        folder: TensorBoard's log folder.
        run: name of the training's folder in it.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    if folder is None:
        return lambda row: None  # noqa: ARG005 - nobody wants it
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "TensorBoard is not installed", remedy="pip install 'sparsemill[tensorboard]', or leave out --tensorboard"
        ) from error
    writer = SummaryWriter(str(folder / run))

    def write(row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name not in _SKIPPED and isinstance(value, int | float) and math.isfinite(value):
                writer.add_scalar(f"train/{name}", value, row["step"])
        writer.flush()

    return write
