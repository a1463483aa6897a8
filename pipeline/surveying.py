"""The survey stage: one pass of the encoder over the store, for all analyses that read it.

Batches are encoded on worker threads, or by the workers of a cluster, and taken in by one, here, in the store's order;
every so often, and when interrupted, the state is written and journalled, so a killed pass goes on where it was and
ends with the same bytes. On a cluster what an encoder finds comes by wire, eight bytes a firing, and the rows that a
killed worker had are encoded again. Rejected: a state a worker, merged at the end (sums in another order are other
bytes, and a state holds places for every feature). Layout of the artifact:
``survey.safetensors`` (``pipeline.analysis.survey``).
"""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from pipeline import training
from pipeline.analysis.survey import Survey, from_arrays, to_arrays
from pipeline.analysis.surveying import Places, SurveyState
from pipeline.cluster import job_for, open_cluster
from pipeline.cluster_worker import Reference, Site
from pipeline.config import SurveyConfig
from pipeline.interruption import Interruption, deferred_interruption
from pipeline.memory import encoder_needs, require_encoder_memory
from pipeline.workspace import Workspace, require_version
from sae.autoencoder import Autoencoder
from sae.kernels.encoder import ActiveFeatures, SparseEncoder
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.reader import ShardReader

OUTPUT_VERSION = 1
SURVEY = "survey.safetensors"
BATCH_ROWS = 4096
BATCHES_A_PIECE = 4


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
            found = _Pass(config, sae, activations, workspace, staging).run(checkpoint).survey()
            staging.write_bytes(SURVEY, safetensors.numpy.save(to_arrays(found)))
            staging.finish(SURVEY, [SURVEY], {"rows": found.n_rows, "firings": int(found.count.sum())})
        checkpoint.clear()  # only now: until the survey is journalled, it is all there is
        return Result(staging.finished[SURVEY])

    return workspace.make(spec, produce)


def load_survey(artifact: Artifact) -> Survey:
    """Reads a survey artifact.

    Raises:
        UnsupportedFormat: it is of another output version.
    """
    require_version(artifact, OUTPUT_VERSION)
    return from_arrays(safetensors.numpy.load(artifact.read_bytes(SURVEY)))


@dataclass
class _Pass:
    """A pass of an encoder over a store.

    Attributes:
        config: how much is looked at and kept.
        sae: the encoder's artifact.
        activations: the store's.
        workspace: where it happens.
        staging: of the survey.
    """

    config: SurveyConfig
    sae: Artifact
    activations: Artifact
    workspace: Workspace
    staging: Staging

    @cached_property
    def reader(self) -> ShardReader:
        """Of the store."""
        return ShardReader.of(self.activations)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """Whose encoder it is."""
        return training.load_autoencoder(self.sae)

    def run(self, checkpoint: "_Checkpoint") -> SurveyState:
        """Takes encoded rows in, in the store's order, from wherever they are encoded."""
        config = self.config
        places = Places(config.top_firings, config.sample_firings, config.kept_firings)
        state = checkpoint.restore() or SurveyState.empty(self.autoencoder.d_sae, places)
        n_rows, done = min(config.rows, self.reader.n_rows), int(state.rows[0])
        encode = self._encoded_on_cluster if self.workspace.runtime.on_cluster else self._encoded_here
        saved = time.monotonic()
        with (
            deferred_interruption() as interruption,
            self.workspace.reporter.track("survey", n_rows, "rows", start=done) as advance,
            closing(encode(range(done, n_rows), interruption)) as encoded,
        ):
            for rows, note in encoded:
                state.take(*rows)
                advance(len(rows.prompt), note=note)
                if time.monotonic() - saved > self.workspace.runtime.checkpoint_seconds:
                    checkpoint.save(state)
                    saved = time.monotonic()
                if interruption.signal is not None:
                    break
            if interruption.signal is not None:
                checkpoint.save(state)
        interruption.stop_if_asked()
        return state

    def _encoded_here(self, rows: range, _interruption: Interruption) -> "Generator[tuple[_Encoded, str]]":
        encoder = SparseEncoder(self.autoencoder, threads=self.workspace.threads)
        for encoded in _encode(self.reader, encoder, rows, prefetch=2):
            yield encoded, ""

    def _encoded_on_cluster(self, rows: range, interruption: Interruption) -> "Generator[tuple[_Encoded, str]]":
        """Workers encode some batches at a time; what they find is a fraction of the rows, and comes by wire."""
        root, workspace = self.workspace.store.root, self.workspace
        opening = _Opening(Reference.to(self.sae, root), Reference.to(self.activations, root))
        job = job_for(self.staging, workspace, workspace.provenance(), opening)
        starts = range(rows.start, rows.stop, BATCHES_A_PIECE * BATCH_ROWS)
        pieces = [range(start, min(start + starts.step, rows.stop)) for start in starts]
        with open_cluster(workspace) as cluster, closing(cluster.in_order(job, pieces, interruption)) as answers:
            for answer in answers:
                for encoded in answer:
                    yield encoded, str(cluster)


class _Encoded(NamedTuple):
    """A batch of rows of the store: what :meth:`SurveyState.take` takes."""

    active: ActiveFeatures
    prompt: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]


def _encode(reader: ShardReader, encoder: SparseEncoder, rows: range, *, prefetch: int) -> Generator[_Encoded]:
    """Encodes rows of the store, from the first of a batch on, batch by batch."""
    done = rows.start
    with reader.sequential(BATCH_ROWS, start=rows.start // BATCH_ROWS, prefetch=prefetch) as batches:
        while done < rows.stop:
            batch = next(batches)
            kept = min(len(batch.rows), rows.stop - done)
            active = encoder.encode(np.ascontiguousarray(batch.rows[:kept]))
            yield _Encoded(active, batch.prompt[:kept].astype(np.int32), batch.position[:kept].astype(np.int32))
            done += kept


@dataclass(frozen=True)
class _Opening:
    """Opens, on a worker, the store and the encoder."""

    sae: Reference
    activations: Reference

    def __call__(self, site: Site) -> Callable[[range], list[_Encoded]]:
        sae = training.load_autoencoder(self.sae.open(site.root))
        reader = ShardReader.of(self.activations.open(site.root))
        threads = site.workspace.threads
        needs = encoder_needs(d_in=sae.d_in, d_sae=sae.d_sae, threads=threads, batch_rows=BATCH_ROWS)
        require_encoder_memory(needs, budget_bytes=site.budget_bytes, where=f"worker {site.name}")
        encoder = SparseEncoder(sae, threads=threads)
        return lambda rows: list(_encode(reader, encoder, rows, prefetch=0))  # what is beyond is another worker's


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
