"""The train stage: shuffled rows -> a sparse autoencoder, with its log, checkpointed and resumable to the same bits.

Rows come from the shards of the activations artifact, or live from its model (pipeline.live). The order of either, the
trainer's step and the evaluation are pure functions of the spec, so a run that is killed and started again continues
from its newest checkpoint and ends with the same bytes. Clock times stay out of the artifact.

Layout of the artifact: ``autoencoder.safetensors`` (W_enc, b_enc, W_dec, b_dec), ``autoencoder.json`` (the trainer's
config and the site), ``training-log.parquet`` (a row every few steps), ``resamplings.json``, and
``densities.safetensors`` (firing counts of every feature over windows of training rows).
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from pipeline import language_model
from pipeline.config import TrainConfig
from pipeline.evaluation import HeldOut, baseline_losses, measure_quality
from pipeline.harvest import mean_activation
from pipeline.interruption import Interruption, deferred_interruption
from pipeline.live import live_activations
from pipeline.memory import START_ROWS
from pipeline.tokens import TokenTable
from pipeline.workspace import Workspace
from sae.autoencoder import Autoencoder
from sae.errors import TrainingDiverged as Diverged
from sae.metrics import StepMetrics
from sae.state import autoencoder_from, autoencoder_json, autoencoder_tensors
from sae.trainer import Trainer
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.batches import ShuffledBatches
from storage.certificate import certify
from storage.errors import TrainingDiverged
from storage.reader import BatchOrder, ReadState, ShardReader

OUTPUT_VERSION = 1
WEIGHTS = "autoencoder.safetensors"
SETTINGS = "autoencoder.json"
LOG = "training-log.parquet"
RESAMPLINGS = "resamplings.json"
DENSITIES = "densities.safetensors"

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

Evaluate = Callable[[Autoencoder], float | None]
_CERTIFIED_BATCHES = 256
_RESULT = "result"


def train(config: TrainConfig, activations: Artifact, workspace: Workspace) -> Made:
    """Trains, or finds, the autoencoder of an activations artifact.

    Raises:
        TrainingDiverged: a loss is not finite; the message names the step and the newest checkpoint.
        CorruptArtifact: a shard is not as it was committed.
    """
    spec = Spec(
        "train", OUTPUT_VERSION, config.model_dump(mode="json"), {"activations": activations.as_parent()}
    )  # fmt: skip
    return workspace.make(spec, _Training(config, activations, workspace).produce)


def settings(artifact: Artifact) -> dict[str, Any]:
    """What a train artifact says of itself: ``autoencoder``, ``config``, ``hook_name`` and ``model``."""
    return json.loads(artifact.read_bytes(SETTINGS))


def load_autoencoder(artifact: Artifact) -> Autoencoder:
    """Reads the autoencoder of a train artifact."""
    tensors = safetensors.torch.load(artifact.read_bytes(WEIGHTS))
    return autoencoder_from(tensors, settings(artifact)["autoencoder"])


def training_log(artifact: Artifact) -> pa.Table:
    """The metrics logged while it was trained, a row every ``log_every_steps`` steps."""
    return pq.read_table(artifact.checked_file(LOG))


@dataclass
class _Progress:
    """What a run has gathered besides the trainer's own state; goes into each checkpoint.

    Attributes:
        reader: where the next batch lies.
        log: rows of the training log.
        resamplings: what was resampled and when.
        density_steps: step at which each window of densities was complete.
        density_rows: rows of each such window.
        density_counts: firing counts of each such window, int64 (d_sae,) each.
        window_start: rows seen when the current window opened.
    """

    reader: ReadState
    log: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    resamplings: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    density_steps: list[int] = field(default_factory=list[int])
    density_rows: list[int] = field(default_factory=list[int])
    density_counts: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    window_start: int = 0


class _Training:
    """One run of the stage."""

    def __init__(self, config: TrainConfig, activations: Artifact, workspace: Workspace):
        self._config = config
        self._activations = activations
        self._workspace = workspace

    def produce(self, staging: Staging) -> Result:
        """Trains from the newest checkpoint, or from the start, to the last step."""
        checkpoints = _Checkpoints(staging)
        if _RESULT not in staging.finished:
            with deferred_interruption() as interruption:
                source = self._source()
                trainer, progress = self._train(source, checkpoints, interruption)
            stats = self._write(staging, trainer, progress) | self._source_stats(source)
            staging.finish(_RESULT, [WEIGHTS, SETTINGS, LOG, RESAMPLINGS, DENSITIES], stats)
        checkpoints.clear()  # only now: until the result is journalled, they are all there is
        return Result(staging.finished[_RESULT])

    def _source(self) -> ShardReader | ShuffledBatches:
        if self._config.source == "store":
            return ShardReader.of(self._activations)
        # A model of its own: the evaluation's is used at the same time, in another thread.
        model = language_model.load_recorded(self._activations, device=self._workspace.runtime.device)
        return live_activations(self._activations, self._tokens(), model)

    def _source_stats(self, source: ShardReader | ShuffledBatches) -> dict[str, Any]:
        if self._config.source == "store":
            return {"source": "store"}
        certificate = certify(source, self._order(), max_batches=_CERTIFIED_BATCHES).to_json()
        left_out = self._tokens().n_prompts("train") - source.n_rows // source.positions
        return {"source": "live", "rows": source.n_rows, "prompts_left_out": left_out, "certificate": certificate}

    def _order(self) -> BatchOrder:
        return BatchOrder(
            seed=self._config.reader_seed, batch_rows=self._config.autoencoder.batch_rows,
            pool_rows=self._config.pool_rows, lanes=self._config.lanes,
        )  # fmt: skip

    def _tokens(self) -> TokenTable:
        return TokenTable(self._workspace.store.parent(self._activations, "tokens"))

    def _train(
        self, source: ShardReader | ShuffledBatches, checkpoints: "_Checkpoints", interruption: Interruption
    ) -> tuple[Trainer, _Progress]:
        trainer, progress = self._restore(checkpoints) or self._start()
        evaluate = self._evaluation()
        steps = self._config.autoencoder.steps
        saved = time.monotonic()
        with (
            self._workspace.reporter.track("train", steps, "steps", start=trainer.steps_taken) as advance,
            source.batches(self._order(), start=progress.reader) as batches,
        ):
            while trainer.steps_taken < steps:
                batch = next(batches)
                metrics = self._step(trainer, torch.from_numpy(batch.rows), checkpoints)
                progress.reader = batch.state
                self._record(progress, trainer, metrics, evaluate)
                advance(note=f"L0 {metrics.l0:.1f}  explained {metrics.fve:.3f}")
                due = time.monotonic() - saved > self._workspace.runtime.checkpoint_seconds
                if due or interruption.signal is not None:
                    checkpoints.save(trainer, progress)
                    saved = time.monotonic()
                interruption.stop_if_asked()
        return trainer, progress

    def _start(self) -> tuple[Trainer, _Progress]:
        reader = ShardReader.of(self._activations)
        rows = next(iter(reader.sequential(min(START_ROWS, reader.n_rows)))).rows
        trainer = Trainer.start(
            self._config.autoencoder, reader.d_in, torch.from_numpy(rows),
            torch.from_numpy(mean_activation(self._activations)), threads=self._workspace.threads,
        )  # fmt: skip
        return trainer, _Progress(ReadState(epoch=0, batch=0))

    def _restore(self, checkpoints: "_Checkpoints") -> tuple[Trainer, _Progress] | None:
        found = checkpoints.newest()
        if found is None:
            return None
        tensors, state = found
        trainer_tensors = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("trainer.")}
        trainer = Trainer.restore(
            self._config.autoencoder, trainer_tensors, state["trainer"], threads=self._workspace.threads
        )
        counts = list(tensors["density_counts"]) if "density_counts" in tensors else []
        progress = _Progress(**(state["progress"] | {"reader": ReadState(**state["progress"]["reader"])}))
        progress.density_counts = counts
        return trainer, progress

    def _step(self, trainer: Trainer, rows: torch.Tensor, checkpoints: "_Checkpoints") -> StepMetrics:
        try:
            return trainer.step(rows)
        except Diverged as error:
            raise TrainingDiverged(
                "the training loss is not finite", where=f"step {trainer.steps_taken + 1}", found=str(error),
                remedy=f"lower the learning rate; the newest checkpoint is {checkpoints.label()}",
            ) from error  # fmt: skip

    def _record(self, progress: _Progress, trainer: Trainer, metrics: StepMetrics, evaluate: Evaluate) -> None:
        window = trainer.density_window()
        if metrics.rows_seen - progress.window_start >= self._config.autoencoder.density_window_rows:
            progress.window_start = metrics.rows_seen
            progress.density_steps.append(metrics.step)
            progress.density_rows.append(window.rows)
            progress.density_counts.append(window.counts)
        if metrics.resampled is not None:
            progress.resamplings.append(asdict(metrics.resampled))
        last = metrics.step == self._config.autoencoder.steps
        evaluated = last or metrics.step % self._config.evaluate_every_steps == 0
        if evaluated or metrics.step % self._config.log_every_steps == 0:
            below = window.fractions_below((1e-6, 1e-5, 1e-4))
            entry = asdict(metrics) | {"resampled": 0 if metrics.resampled is None else len(metrics.resampled.features)}
            entry |= {"density_rows": window.rows, "dead_fraction": window.dead_fraction()}
            entry |= dict(zip(("below_1e-6", "below_1e-5", "below_1e-4"), below, strict=True))
            entry |= {"loss_recovered": evaluate(trainer.autoencoder) if evaluated else None}
            progress.log.append(entry)

    def _evaluation(self) -> Evaluate:
        table = self._tokens()
        n = min(self._config.evaluate_prompts, table.n_prompts("held_out"))
        held_out = HeldOut(
            model=language_model.load_recorded(self._activations),  # beside the autoencoder, on the CPU
            tokens=table.ids("held_out", range(n)),
            hook_name=str(self._activations.config["hook_name"]),
            first_position=0 if self._activations.config["include_bos"] else 1,
        )
        baselines = baseline_losses(held_out)
        return lambda sae: measure_quality(sae, held_out, baselines).recovered

    def _write(self, staging: Staging, trainer: Trainer, progress: _Progress) -> dict[str, Any]:
        sae = trainer.autoencoder
        config = self._config.model_dump(mode="json")
        site = {"hook_name": self._activations.config["hook_name"], "model": self._activations.config["model"]}
        staging.write_bytes(WEIGHTS, safetensors.torch.save(autoencoder_tensors(sae)))
        staging.write_json(SETTINGS, {**site, "autoencoder": autoencoder_json(sae), "config": config})
        staging.write_bytes(LOG, _parquet(pa.Table.from_pylist(progress.log, schema=LOG_SCHEMA)))
        staging.write_json(RESAMPLINGS, progress.resamplings)
        staging.write_bytes(DENSITIES, safetensors.torch.save(_density_tensors(progress, sae.d_sae)))
        last = progress.log[-1]
        kept = ("rows_seen", "l2", "l1", "l0", "fve", "loss_recovered", "dead_fraction", "below_1e-4")
        sizes = {"steps": trainer.steps_taken, "d_in": sae.d_in, "d_sae": sae.d_sae}
        return sizes | {name: last[name] for name in kept}


class _Checkpoints:
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

    def save(self, trainer: Trainer, progress: _Progress) -> None:
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


def _density_tensors(progress: _Progress, d_sae: int) -> dict[str, torch.Tensor]:
    counts = progress.density_counts
    return {
        "counts": torch.stack(counts) if counts else torch.zeros(0, d_sae, dtype=torch.int64),
        "rows": torch.tensor(progress.density_rows, dtype=torch.int64),
        "step": torch.tensor(progress.density_steps, dtype=torch.int64),
    }


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()
