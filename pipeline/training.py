"""The train stage: shuffled rows -> a sparse autoencoder, with its log, checkpointed and resumable to the same bits.

Rows come from the shards of the activations artifact, or live from its model (pipeline.live). The order of either, the
trainer's step and the evaluation are pure functions of the spec, so a run that is killed and started again continues
from its newest checkpoint and ends with the same bytes. Clock times stay out of the artifact.

Layout of the artifact: ``autoencoder.safetensors`` (W_enc, b_enc, W_dec, b_dec), ``autoencoder.json`` (the trainer's
config and the site), ``training-log.parquet`` (a row every few steps), ``resamplings.json``, and
``densities.safetensors`` (firing counts of every feature over windows of training rows); and, where the encoder was
kept orthogonal to directions, these as ``directions.safetensors``.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import safetensors.torch
import torch

from pipeline import language_model
from pipeline.analysis.context import TrainingDensities
from pipeline.config import TrainConfig
from pipeline.evaluation import HeldOut, baseline_losses, measure_quality
from pipeline.harvest import mean_activation
from pipeline.interruption import EXIT_TERMINATED, Interruption, deferred_interruption
from pipeline.live import live_activations
from pipeline.memory import START_ROWS
from pipeline.parallel import own_device, ranks
from pipeline.scalars import Write, scalar_writer
from pipeline.tokens import TokenTable
from pipeline.torch_batches import TorchBatch, to_device
from pipeline.training_state import LOG_SCHEMA, Checkpoints, Progress, density_tensors, to_parquet
from pipeline.workspace import Workspace, require_version
from sae.autoencoder import Autoencoder
from sae.errors import StateMismatch
from sae.errors import TrainingDiverged as Diverged
from sae.metrics import ResamplingEvent, StepMetrics
from sae.resampling import exempt_features
from sae.state import autoencoder_from, autoencoder_json, autoencoder_tensors
from sae.trainer import Trainer
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.batches import Batch, ShuffledBatches
from storage.certificate import certify
from storage.errors import SparsemillError, TrainingDiverged, UnsupportedFormat
from storage.prefetch import Prefetched
from storage.reader import BatchOrder, ReadState, ShardReader

OUTPUT_VERSION = 2
AUTOENCODER_STAGES = ("train", "import")
"""Stages whose artifacts hold an autoencoder: trained here, or read from another program's checkpoint."""
WEIGHTS = "autoencoder.safetensors"
SETTINGS = "autoencoder.json"
LOG = "training-log.parquet"
RESAMPLINGS = "resamplings.json"
DENSITIES = "densities.safetensors"
DIRECTIONS = "directions.safetensors"

Evaluate = Callable[[Autoencoder], float | None]
_CERTIFIED_BATCHES = 256
_RESULT = "result"


def spec(config: TrainConfig, activations: Artifact, directions: Artifact | None = None) -> Spec:
    """The question that a training answers; for arguments see :func:`train`."""
    parents = {"activations": activations} | ({} if directions is None else {"directions": directions})
    return Spec(
        "train", OUTPUT_VERSION, config.model_dump(mode="json"),
        {role: artifact.as_parent() for role, artifact in parents.items()},
    )  # fmt: skip


def train(
    config: TrainConfig, activations: Artifact, workspace: Workspace, *, directions: Artifact | None = None
) -> Made:
    """Trains, or finds, the autoencoder of an activations artifact.

    Args:
        config: how.
        activations: on what.
        workspace: where it happens.
        directions: unit directions that the encoder is kept orthogonal to (``pipeline.directions``); none by default.

    Raises:
        TrainingDiverged: a loss is not finite; the message names the step and the newest checkpoint.
        CorruptArtifact: a shard is not as it was committed.
    """
    work = _Training(config, activations, workspace, None if directions is None else read_directions(directions))
    group = work.ranks
    if not group.leads:
        return work.follow()
    try:
        made = workspace.make(spec(config, activations, directions), work.produce)
    except Exception as error:
        if not work.under_way:  # later, the others meet the end of a step themselves
            group.tell({"failed": str(error)})
        raise
    group.tell({"made": made.artifact.id, "status": made.status})
    return made


def settings(artifact: Artifact) -> dict[str, Any]:
    """What an autoencoder's artifact says of itself: ``autoencoder``, ``config``, ``hook_name`` and ``model``."""
    if artifact.stage == "train":
        require_version(artifact, OUTPUT_VERSION)
    return json.loads(artifact.read_bytes(SETTINGS))


def load_autoencoder(artifact: Artifact) -> Autoencoder:
    """Reads the autoencoder of an artifact of ``AUTOENCODER_STAGES``."""
    said = settings(artifact)
    return autoencoder_from(safetensors.torch.load(artifact.read_bytes(WEIGHTS)), said["autoencoder"])


def read_directions(artifact: Artifact) -> torch.Tensor | None:
    """The unit directions (k, d_in) that an artifact holds, or None where an encoder was not kept orthogonal to any."""
    if DIRECTIONS not in artifact.manifest.files:
        return None
    return safetensors.torch.load(artifact.read_bytes(DIRECTIONS))["directions"]


def training_log(artifact: Artifact) -> pa.Table:
    """The metrics logged while it was trained, a row every ``log_every_steps`` steps."""
    return pq.read_table(artifact.checked_file(LOG))


def training_densities(artifact: Artifact) -> TrainingDensities:
    """How often each feature fired while it was trained, and what was resampled."""
    tensors = safetensors.numpy.load(artifact.read_bytes(DENSITIES))
    config = TrainConfig.model_validate(settings(artifact)["config"]).autoencoder
    events = [ResamplingEvent(**event) for event in json.loads(artifact.read_bytes(RESAMPLINGS))]
    return TrainingDensities(tensors["counts"], tensors["rows"], events, exempt_features(config).numpy())


class _Training:
    """One run of the stage."""

    def __init__(
        self, config: TrainConfig, activations: Artifact, workspace: Workspace, directions: torch.Tensor | None
    ):
        self._config = config
        self._activations = activations
        self._workspace = workspace
        self._directions = directions
        self.ranks = ranks()
        self._device = own_device(workspace.runtime.device)
        self.under_way = False
        self._pace: dict[str, float] = {}
        self._write_scalars: Write = scalar_writer(None, "")

    def follow(self) -> Made:
        """Takes every step of a training that another rank leads; where that found it, none."""
        message, tensors = self.ranks.hear()
        if "trainer" in message:
            trainer = self._restored(tensors, message["trainer"])
            start = ReadState(**message["reader"])
            with deferred_interruption() as interruption, self._batches(self._source(), start) as read:
                batches = to_device(read, self._device)
                while trainer.steps_taken < self._config.autoencoder.steps:
                    trainer.step(next(batches).rows)
                    if self.ranks.any(interruption.signal is not None):
                        self._stop(interruption)
            message, _ = self.ranks.hear()
        if "failed" in message:
            raise SparsemillError("the first rank could not train", found=message["failed"])
        return Made(self._workspace.store.open(message["made"]), message["status"])

    def _stop(self, interruption: Interruption) -> None:
        interruption.stop_if_asked()
        raise SystemExit(EXIT_TERMINATED)  # another rank was asked

    def produce(self, staging: Staging) -> Result:
        """Trains from the newest checkpoint, or from the start, to the last step."""
        checkpoints = Checkpoints(staging)
        if _RESULT not in staging.finished:
            self._write_scalars = scalar_writer(self._workspace.runtime.tensorboard, staging.spec.id)
            with deferred_interruption() as interruption:
                source = self._source()
                trainer, progress = self._train(source, checkpoints, interruption)
            stats = self._write(staging, trainer, progress) | self._source_stats(source)
            names = [WEIGHTS, SETTINGS, LOG, RESAMPLINGS, DENSITIES]
            staging.finish(_RESULT, names if self._directions is None else [*names, DIRECTIONS], stats)
        checkpoints.clear()  # only now: until the result is journalled, they are all there is
        return Result(staging.finished[_RESULT], {**self._pace})

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

    def _batches(self, source: ShardReader | ShuffledBatches, start: ReadState) -> Prefetched[Batch]:
        group = self.ranks.collective
        return source.batches(self._order(), start=start, rank=group.rank, world=group.world)

    def _train(
        self, source: ShardReader | ShuffledBatches, checkpoints: Checkpoints, interruption: Interruption
    ) -> tuple[Trainer, Progress]:
        trainer, progress = self._restore(checkpoints) or self._start()
        progress.worlds = sorted({*progress.worlds, self.ranks.collective.world})
        evaluate = self._evaluation()
        steps = self._config.autoencoder.steps
        self.ranks.tell({"trainer": trainer.state_json(), "reader": asdict(progress.reader)}, trainer.state_tensors())
        self.under_way = True
        saved = began = time.monotonic()
        waited, rows = 0.0, 0
        with (
            self._workspace.reporter.track("train", steps, "steps", start=trainer.steps_taken) as advance,
            self._batches(source, progress.reader) as read,
        ):
            batches = to_device(read, self._device)
            while trainer.steps_taken < steps:
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                metrics = self._step(trainer, batch, progress, checkpoints)
                progress.reader = batch.state
                rows += metrics.rows
                seconds = time.monotonic() - began
                self._pace = {"rows_per_second": rows / seconds, "waiting_for_rows": waited / seconds}
                self._record(progress, trainer, metrics, evaluate)
                advance(note=_note(metrics, progress, self._pace))
                stop = self.ranks.any(interruption.signal is not None)
                if stop or time.monotonic() - saved > self._workspace.runtime.checkpoint_seconds:
                    checkpoints.save(trainer, progress)
                    saved = time.monotonic()
                if stop:
                    self._stop(interruption)
        return trainer, progress

    def _start(self) -> tuple[Trainer, Progress]:
        reader = ShardReader.of(self._activations)
        rows = next(iter(reader.sequential(min(START_ROWS, reader.n_rows)))).rows
        mean = torch.from_numpy(mean_activation(self._activations))
        trainer = Trainer.start(
            self._config.autoencoder, reader.d_in, torch.from_numpy(rows).to(self._device), mean.to(self._device),
            encoder_directions=self._directions, threads=self._workspace.threads, collective=self.ranks.collective,
        )  # fmt: skip
        return trainer, Progress(ReadState(epoch=0, batch=0))

    def _restore(self, checkpoints: Checkpoints) -> tuple[Trainer, Progress] | None:
        found = checkpoints.newest()
        if found is None:
            return None
        tensors, state = found
        trainer_tensors = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("trainer.")}
        trainer = self._restored(trainer_tensors, state["trainer"])
        counts = list(tensors["density_counts"]) if "density_counts" in tensors else []
        progress = Progress(**(state["progress"] | {"reader": ReadState(**state["progress"]["reader"])}))
        progress.density_counts = counts
        return trainer, progress

    def _restored(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Trainer:
        tensors = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        try:
            return Trainer.restore(
                self._config.autoencoder, tensors, state,
                threads=self._workspace.threads, collective=self.ranks.collective,
            )  # fmt: skip
        except StateMismatch as error:
            raise UnsupportedFormat(
                "a checkpoint that this version does not read", where=f"{error.name} of the saved training state",
                found=f"{error.name} {error.found}", expected=error.expected,
                remedy="go on with the version that wrote it, or remove its folder in .staging and begin anew",
            ) from error  # fmt: skip

    def _step(self, trainer: Trainer, batch: TorchBatch, progress: Progress, checkpoints: Checkpoints) -> StepMetrics:
        try:
            return trainer.step(batch.rows)
        except Diverged as error:
            places = zip(batch.prompt[:8].tolist(), batch.position[:8].tolist(), strict=True)
            tokens = ", ".join(f"{prompt}:{position}" for prompt, position in places)
            at = progress.reader  # which names all rows of the batch, whatever the ranks
            raise TrainingDiverged(
                "the training loss is not finite",
                where=f"step {trainer.steps_taken + 1}, the reader's epoch {at.epoch}, batch {at.batch}: "
                f"{len(batch.rows)} rows (prompt:position) {tokens}, ...",
                found=str(error),
                remedy=f"lower the learning rate; the newest checkpoint is {checkpoints.label()}",
            ) from error

    def _record(self, progress: Progress, trainer: Trainer, metrics: StepMetrics, evaluate: Evaluate) -> None:
        window = trainer.density_window()
        if metrics.rows_seen - progress.window_start >= self._config.autoencoder.density_window_rows:
            progress.window_start = metrics.rows_seen
            progress.density_steps.append(metrics.step)
            progress.density_rows.append(window.rows)
            progress.density_counts.append(window.counts.cpu())
        if metrics.resampled is not None:
            progress.resamplings.append(asdict(metrics.resampled))
        last = metrics.step == self._config.autoencoder.steps
        evaluated = last or metrics.step % self._config.evaluate_every_steps == 0
        if evaluated or metrics.step % self._config.log_every_steps == 0:
            below = window.fractions_below((1e-6, 1e-5, 1e-4))
            entry = asdict(metrics) | {"resampled": progress.resampled_since_the_last_row()}
            entry |= {"density_rows": window.rows, "dead_fraction": window.dead_fraction()}
            entry |= dict(zip(("below_1e-6", "below_1e-5", "below_1e-4"), below, strict=True))
            entry |= {"loss_recovered": evaluate(trainer.autoencoder.to("cpu")) if evaluated else None}
            progress.log.append(entry)
            self._write_scalars({**entry, **self._pace})  # the clock's figures for those who look on: none is logged

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

    def _write(self, staging: Staging, trainer: Trainer, progress: Progress) -> dict[str, Any]:
        sae = trainer.autoencoder.to("cpu")
        config = self._config.model_dump(mode="json")
        site = {"hook_name": self._activations.config["hook_name"], "model": self._activations.config["model"]}
        staging.write_bytes(WEIGHTS, safetensors.torch.save(autoencoder_tensors(sae)))
        staging.write_json(SETTINGS, {**site, "autoencoder": autoencoder_json(sae), "config": config})
        staging.write_bytes(LOG, to_parquet(pa.Table.from_pylist(progress.log, schema=LOG_SCHEMA)))
        staging.write_json(RESAMPLINGS, progress.resamplings)
        staging.write_bytes(DENSITIES, safetensors.torch.save(density_tensors(progress, sae.d_sae)))
        if self._directions is not None:
            staging.write_bytes(DIRECTIONS, safetensors.torch.save({"directions": self._directions}))
        last = progress.log[-1]
        kept = ("rows_seen", "l2", "l1", "l0", "fve", "loss_recovered", "dead_fraction", "below_1e-4")
        sizes = {"ranks": progress.worlds, "steps": trainer.steps_taken, "d_in": sae.d_in, "d_sae": sae.d_sae}
        return sizes | {name: last[name] for name in kept}


def _note(metrics: StepMetrics, progress: Progress, pace: Mapping[str, float]) -> str:
    """What is shown beside the bar: of this step, and of the last rows of the log that have it."""
    shown = [f"L0 {metrics.l0:.1f}", f"explained {metrics.fve:.3f}"]
    if progress.log:
        shown.append(f"dead {progress.log[-1]['dead_fraction']:.1%}")
    recovered = progress.last_loss_recovered()
    if recovered is not None:
        shown.append(f"recovered {recovered:.1%}")
    speed = f"{pace['rows_per_second']:,.0f} rows/s, {pace['waiting_for_rows']:.0%} waiting for rows"
    return "  ".join([*shown, speed])
