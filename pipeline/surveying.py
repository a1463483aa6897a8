"""The survey stage: one pass of the encoder over the store, for all analyses that read it.

Batches are encoded on worker threads and taken in by one; every so often, and when interrupted, the state is written
and journalled, so a killed pass goes on where it was and ends with the same bytes. Layout of the artifact:
``survey.safetensors`` (``pipeline.analysis.survey``).
"""

import time

import numpy as np
import safetensors.numpy

from pipeline import training
from pipeline.analysis.survey import Survey, from_arrays, to_arrays
from pipeline.analysis.surveying import Places, SurveyState
from pipeline.config import SurveyConfig
from pipeline.interruption import deferred_interruption
from pipeline.workspace import Workspace
from sae.kernels.encoder import SparseEncoder
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.reader import ShardReader

OUTPUT_VERSION = 1
SURVEY = "survey.safetensors"
BATCH_ROWS = 4096


def survey(config: SurveyConfig, sae: Artifact, workspace: Workspace) -> Made:
    """Makes, or finds, the survey of an autoencoder over its activations.

    Args:
        config: how much is looked at and kept.
        sae: a train artifact.
        workspace: where it happens.
    """
    activations = workspace.store.parent(sae, "activations")
    parents = {"sae": sae.as_parent(), "activations": activations.as_parent()}
    spec = Spec("survey", OUTPUT_VERSION, config.model_dump(mode="json"), parents)

    def produce(staging: Staging) -> Result:
        checkpoint = _Checkpoint(staging)
        if SURVEY not in staging.finished:
            found = _pass(config, sae, ShardReader.of(activations), checkpoint, workspace).survey()
            staging.write_bytes(SURVEY, safetensors.numpy.save(to_arrays(found)))
            staging.finish(SURVEY, [SURVEY], {"rows": found.n_rows, "firings": int(found.count.sum())})
        checkpoint.clear()  # only now: until the survey is journalled, it is all there is
        return Result(staging.finished[SURVEY])

    return workspace.make(spec, produce)


def load_survey(artifact: Artifact) -> Survey:
    """Reads a survey artifact."""
    return from_arrays(safetensors.numpy.load(artifact.read_bytes(SURVEY)))


def _pass(
    config: SurveyConfig, sae: Artifact, reader: ShardReader, checkpoint: "_Checkpoint", workspace: Workspace
) -> SurveyState:
    encoder = SparseEncoder(training.load_autoencoder(sae), threads=workspace.threads)
    places = Places(config.top_firings, config.sample_firings, config.kept_firings)
    state = checkpoint.restore() or SurveyState.empty(encoder.d_sae, places)
    n_rows, done = min(config.rows, reader.n_rows), int(state.rows[0])
    saved = time.monotonic()
    with (
        deferred_interruption() as interruption,
        workspace.reporter.track("survey", n_rows, "rows", start=done) as advance,
        reader.sequential(BATCH_ROWS, start=done // BATCH_ROWS) as batches,
    ):
        while done < n_rows:
            batch = next(batches)
            kept = min(len(batch.rows), n_rows - done)
            active = encoder.encode(np.ascontiguousarray(batch.rows[:kept]))
            state.take(active, batch.prompt[:kept].astype(np.int32), batch.position[:kept].astype(np.int32))
            done += kept
            advance(kept)
            if time.monotonic() - saved > workspace.runtime.checkpoint_seconds or interruption.signal is not None:
                checkpoint.save(state)
                saved = time.monotonic()
            interruption.stop_if_asked()
    return state


class _Checkpoint:
    """The newest state of a pass, as a unit of its staging folder."""

    def __init__(self, staging: Staging):
        self._staging = staging

    def _units(self) -> list[str]:
        return [unit for unit in self._staging.finished if unit != SURVEY]

    def restore(self) -> SurveyState | None:
        """The newest whole state; a damaged one was dropped when the journal was read."""
        units = self._units()
        if not units:
            return None
        arrays = safetensors.numpy.load_file(self._staging.path(units[-1]))
        return SurveyState(*(arrays[name] for name in SurveyState._fields))

    def save(self, state: SurveyState) -> None:
        """Writes a state, then discards the ones before."""
        name = f"state-{state.rows[0]:012d}.safetensors"
        self._staging.write_bytes(name, safetensors.numpy.save(state._asdict()))
        self._staging.finish(name, [name])
        for old in self._units()[:-1]:
            self._staging.discard(old)

    def clear(self) -> None:
        """Discards all states."""
        for name in self._units():
            self._staging.discard(name)
