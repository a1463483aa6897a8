"""What a training run gathers besides the trainer's own state, and its checkpoints in the stage's staging folder."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from sae.trainer import Trainer
from storage.artifacts import Staging
from storage.reader import ReadState

LOG_SCHEMA = pa.schema(
    [(name, pa.int64()) for name in ("step", "rows", "rows_seen", "resampled", "density_rows")]
    + [("engine", pa.string())]
    + [
        (name, pa.float64())
        for name in (
            "loss", "l2", "l1", "l0", "fve", "loss_recovered",
            "dead_fraction", "below_1e-6", "below_1e-5", "below_1e-4",
            "learning_rate", "l1_coeff", "grad_norm", "decoder_norm_min", "decoder_norm_max",
        )
    ]
)  # fmt: skip
"""Columns of the training log; fixed, so that rows read back from a checkpoint give the bytes of rows never written."""


@dataclass
class Progress:
    """What a run has gathered besides the trainer's own state; goes into each checkpoint.

    Attributes:
        reader: where the next batch lies.
        log: rows of the training log.
        resamplings: what was resampled and when.
        density_steps: step at which each window of densities was complete.
        density_rows: rows of each such window.
        density_counts: firing counts of each such window, int64 (d_sae,) each.
        window_start: rows seen when the current window opened.
        worlds: by how many ranks steps were taken; sums over ranks move the last bits.
    """

    reader: ReadState
    log: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    resamplings: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    density_steps: list[int] = field(default_factory=list[int])
    density_rows: list[int] = field(default_factory=list[int])
    density_counts: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    window_start: int = 0
    worlds: list[int] = field(default_factory=list[int])

    def resampled_since_the_last_row(self) -> int:
        """Features resampled after the step that the log's last row is of; at first, since the start."""
        last = self.log[-1]["step"] if self.log else 0
        return sum(len(event["features"]) for event in self.resamplings if event["step"] > last)

    def last_loss_recovered(self) -> float | None:
        """Of the newest row of the log that has it; None before the first evaluation."""
        measured = (row["loss_recovered"] for row in reversed(self.log))
        return next((recovered for recovered in measured if recovered is not None), None)


class Checkpoints:
    """The newest two states of a run, as units of its staging folder; cleared before the artifact is committed."""

    def __init__(self, staging: Staging):
        self._staging = staging

    def _units(self) -> list[str]:
        return sorted(unit for unit in self._staging.finished if unit.startswith("checkpoint-"))

    def label(self) -> str:
        """The newest checkpoint's name, or that there is none."""
        units = self._units()
        return units[-1] if units else "none yet"

    def newest(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and JSON of the newest whole checkpoint; a damaged one was dropped when the journal was read."""
        units = self._units()
        if not units:
            return None
        name = units[-1]
        tensors = safetensors.torch.load_file(self._staging.path(f"{name}.safetensors"))
        return tensors, json.loads(self._staging.path(f"{name}.json").read_text())

    def save(self, trainer: Trainer, progress: Progress) -> None:
        """Writes a checkpoint, then discards all but the newest two."""
        name = f"checkpoint-{trainer.steps_taken:09d}"
        tensors = {f"trainer.{key}": tensor for key, tensor in trainer.state_tensors().items()}
        if progress.density_counts:
            tensors["density_counts"] = torch.stack(progress.density_counts)
        gathered = asdict(progress)
        gathered.pop("density_counts")
        self._staging.write_bytes(f"{name}.safetensors", safetensors.torch.save(tensors))
        self._staging.write_json(f"{name}.json", {"trainer": trainer.state_json(), "progress": gathered})
        self._staging.finish(name, [f"{name}.safetensors", f"{name}.json"])
        for old in self._units()[:-2]:
            self._staging.discard(f"{old}.json")

    def clear(self) -> None:
        """Discards all checkpoints."""
        for name in self._units():
            self._staging.discard(f"{name}.json")


def density_tensors(progress: Progress, d_sae: int) -> dict[str, torch.Tensor]:
    """Firing counts of the windows, int64 (n_windows, d_sae), with the rows of each and the step that it ended with."""
    counts = progress.density_counts
    return {
        "counts": torch.stack(counts) if counts else torch.zeros(0, d_sae, dtype=torch.int64),
        "rows": torch.tensor(progress.density_rows, dtype=torch.int64),
        "step": torch.tensor(progress.density_steps, dtype=torch.int64),
    }


def to_parquet(table: pa.Table) -> bytes:
    """The bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()
