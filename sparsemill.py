"""The public API of a notebook: open what a run made, by any name it answers to.

A reference is an id, the unique beginning of one, a tag, ``latest``, or the path of an artifact's folder. Artifacts are
looked for in SPARSEMILL_HOME, else in ``./artifacts``. ``examples/activation_store.ipynb`` shows all of it at work.

Examples:
    Rows, and where they come from:

    >>> import numpy as np, sparsemill, torch
    >>> activations = sparsemill.open_activations("latest")
    >>> batch = activations.read(0, 8)  # the first rows of the store, itself shuffled
    >>> batch.rows.shape == (8, activations.d_in)
    True
    >>> rows = activations.rows_at(batch.prompt, batch.position)  # by token
    >>> np.array_equal(rows, batch.rows)
    True

    The text around one, with the token marked:

    >>> texts = sparsemill.open_texts("latest")
    >>> excerpt = str(texts.around(batch.prompt[0], batch.position[0], before=20, after=10))

    Shuffled batches, and the same ones again after an interruption:

    >>> order = sparsemill.BatchOrder(seed=0, batch_rows=256, pool_rows=131072)
    >>> with activations.batches(order) as batches:
    ...     first, second = next(batches), next(batches)
    >>> with activations.batches(order, start=first.state) as batches:
    ...     again = next(batches)
    >>> np.array_equal(again.rows, second.rows)
    True

    What was measured on the way, and out-of-core work of your own:

    >>> statistics = sparsemill.open_statistics("latest")
    >>> np.allclose(statistics.mean, activations.dask().mean(0).compute(), atol=1e-4)
    True
    >>> values, directions = statistics.singular_vectors()

    An autoencoder:

    >>> sae = sparsemill.open_sae("latest")
    >>> l0 = (sae.encode(torch.from_numpy(batch.rows)) > 0).sum(1)
"""

from pathlib import Path

from pipeline.config import Runtime, load_preset, preset_names
from pipeline.harvest import moments
from pipeline.language_model import LanguageModel
from pipeline.language_model import load as load_language_model
from pipeline.statistics import Moments
from pipeline.texts import Texts, texts_of
from pipeline.tokens import TokenTable
from pipeline.torch_batches import TorchBatches, to_device
from pipeline.training import AUTOENCODER_STAGES, load_autoencoder
from sae.autoencoder import Autoencoder
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore
from storage.reader import BatchOrder, ReadState, ShardReader

__all__ = [
    "artifacts",
    "open_activations",
    "open_texts",
    "open_statistics",
    "open_sae",
    "open_tokens",
    "load_language_model",
    "load_preset",
    "preset_names",
    "to_device",
    "Artifact",
    "ArtifactStore",
    "Autoencoder",
    "BatchOrder",
    "LanguageModel",
    "Moments",
    "ReadState",
    "ShardReader",
    "Texts",
    "TokenTable",
    "TorchBatches",
]


def artifacts(root: Path | str | None = None) -> ArtifactStore:
    """The artifact store.

    Args:
        root: its folder; SPARSEMILL_HOME by default, else ./artifacts.

    Examples:
        >>> [artifact.id for artifact in sparsemill.artifacts().list("harvest")] != []
        True
    """
    return ArtifactStore(Runtime().root if root is None else Path(root))


def open_activations(reference: str = "latest", *, root: Path | str | None = None) -> ShardReader:
    """A reader of an activation store: shuffled batches, rows by (prompt, position), a Dask array."""
    return ShardReader.of(artifacts(root).resolve(reference, stage="harvest"))


def open_texts(reference: str = "latest", *, root: Path | str | None = None) -> Texts:
    """The texts around the rows of an activation store.

    Args:
        reference: of the *activations*, not of the tokens that they were made from.
        root: of the artifact store, which must hold the tokens too.
    """
    store = artifacts(root)
    activations = store.resolve(reference, stage="harvest")
    return texts_of(activations, store.parent(activations, "tokens"))


def open_statistics(reference: str = "latest", *, root: Path | str | None = None) -> Moments:
    """What a harvest measured of its rows: mean, minimum and maximum of each neuron, singular vectors."""
    return moments(artifacts(root).resolve(reference, stage="harvest"))


def open_sae(reference: str = "latest", *, root: Path | str | None = None) -> Autoencoder:
    """An autoencoder, trained here or imported."""
    return load_autoencoder(artifacts(root).resolve(reference, stage=AUTOENCODER_STAGES))


def open_tokens(reference: str = "latest", *, root: Path | str | None = None) -> TokenTable:
    """The prompts of a tokens artifact."""
    return TokenTable(artifacts(root).resolve(reference, stage="tokenize"))
