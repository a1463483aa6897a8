"""Where the texts of a corpus are encoded: on threads of this process, or by the workers of a cluster.

Here as there this process alone reads documents, leaves out duplicates, cuts long texts, mixes and packs, in one order:
so the ids, and the artifact's bytes, do not depend on where a batch is encoded. A worker gets the texts of a batch and
answers with their ids, all in one array. It has the tokenizer by the model's name, as it has a model to harvest with,
and the file's sha256 must be the coordinator's.

Cost of a cluster: what is sent, some 8 bytes a token, and a round trip a batch, which takes this process some 10 ms of
processor time, for which batches are larger there.
Rejected: sending the tokenizer with the batches (2 MB each time), and workers that read files and make prompts
(duplicates are known, and prompts cut, in one order only).
"""

import os
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from pipeline.cluster import Cluster, job_for, open_cluster
from pipeline.cluster_worker import Job, Site
from pipeline.config import TokenizeConfig
from pipeline.corpus.documents import Ids
from pipeline.interruption import Interruption, deferred_interruption
from pipeline.model_files import ModelFiles, find_files
from pipeline.text_encoding import SWITCH, TextEncoder, Texts, ThreadWork, encode_texts, prepared, provenance
from pipeline.workspace import Workspace
from storage.artifacts import Staging
from storage.errors import ConfigError


@contextmanager
def encoder_for(
    config: TokenizeConfig, files: ModelFiles, tokenizer: Tokenizer, workspace: Workspace, staging: Staging
) -> Generator[TextEncoder]:
    """What encodes where the runtime settings say, for the ``with`` block.

    Args:
        config: of the stage; if its sources hold no texts, no cluster is asked.
        files: of the model.
        tokenizer: of these files.
        workspace: of this process.
        staging: of the artifact.
    """
    if not workspace.runtime.on_cluster or all(source.kind == "tokenized" for source in config.sources):
        with ThreadWork(tokenizer, workspace.threads) as threads:
            yield TextEncoder(tokenizer, threads)
        return
    with deferred_interruption() as interruption, open_cluster(workspace) as cluster, ExitStack() as streams:
        name = files.name if files.commit is None else f"{files.name}@{files.commit}"
        opening = _Opening(name, files.tokenizer_sha256)
        job = job_for(staging, workspace, provenance(), opening, small=True)
        yield TextEncoder(tokenizer, ClusterWork(cluster, job, interruption, streams))
    interruption.stop_if_asked()


class ClusterWork:
    """Workers of a cluster, as a :class:`~pipeline.text_encoding.BatchWork`.

    Args:
        cluster: whose they are.
        job: theirs.
        interruption: ends what is under way.
        streams: closes it before the cluster, where the work failed too.
    """

    batch_characters = 1 << 20  # a third of a second of one core, beside which a round trip is little

    def __init__(
        self, cluster: Cluster, job: "Job[Texts, EncodedTexts]", interruption: Interruption, streams: ExitStack
    ):
        self._cluster, self._job, self._interruption = cluster, job, interruption
        self._streams = streams

    @property
    def note(self) -> str:
        """How many workers there are."""
        return str(self._cluster)

    def in_order(self, batches: Iterable[Texts], most_ahead: int) -> Generator[list[Ids]]:  # noqa: ARG002
        """See ``BatchWork``; the cluster's size says how far ahead.

        Raises:
            KeyboardInterrupt, SystemExit: a stop was asked for.
        """
        stream = self._streams.enter_context(closing(self._cluster.in_order(self._job, batches, self._interruption)))
        for encoded in stream:
            yield np.split(encoded.ids, encoded.ends[:-1])
        self._interruption.stop_if_asked()  # or what is left would pass for the end of the source


class EncodedTexts(NamedTuple):
    """Ids of a batch of texts, one after the other, int32; and where each one's end, int64 (n_texts,)."""

    ids: Ids
    ends: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Opening:
    """Opens, on a worker, a language model's tokenizer."""

    language_model: str
    tokenizer_sha256: str

    def __call__(self, site: Site) -> Callable[[Texts], EncodedTexts]:
        files = find_files(self.language_model)
        if files.tokenizer_sha256 != self.tokenizer_sha256:
            raise ConfigError(
                f"a worker has another tokenizer of {self.language_model} than the coordinator", where=site.name,
                found=files.tokenizer_sha256, expected=self.tokenizer_sha256,
                remedy="give all machines the same model files",
            )  # fmt: skip
        os.environ[SWITCH] = "false"  # this process has as many threads as it was given
        tokenizer = prepared(files.read_tokenizer())

        def encode(batch: Texts) -> EncodedTexts:
            ids = encode_texts(tokenizer, batch.texts)
            return EncodedTexts(np.concatenate(ids), np.cumsum([len(one) for one in ids]))

        return encode
