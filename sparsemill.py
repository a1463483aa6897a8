"""The public API of a notebook: open what a run made, by any name it answers to.

>>> import sparsemill
>>> activations = sparsemill.open_activations("latest")      # a ShardReader
>>> sae = sparsemill.open_sae("latest")                      # an Autoencoder
>>> sae.encode(torch.from_numpy(activations.read(0, 8).rows))
"""

from pathlib import Path

from pipeline.config import Runtime, load_preset, preset_names
from pipeline.language_model import LanguageModel
from pipeline.language_model import load as load_language_model
from pipeline.tokens import TokenTable
from pipeline.training import load_autoencoder
from sae.autoencoder import Autoencoder
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore
from storage.reader import BatchOrder, ShardReader

__all__ = [
    "artifacts",
    "open_activations",
    "open_sae",
    "open_tokens",
    "load_language_model",
    "load_preset",
    "preset_names",
    "Artifact",
    "ArtifactStore",
    "Autoencoder",
    "BatchOrder",
    "LanguageModel",
    "ShardReader",
    "TokenTable",
]


def artifacts(root: Path | str | None = None) -> ArtifactStore:
    """The artifact store.

    Args:
        root: its folder; SPARSEMILL_HOME by default, else ./artifacts.
    """
    return ArtifactStore(Runtime().root if root is None else Path(root))


def open_tokens(reference: str = "latest", *, root: Path | str | None = None) -> TokenTable:
    """The prompts of a tokens artifact: id, unique prefix, tag, ``latest`` or a folder's path."""
    return TokenTable(artifacts(root).resolve(reference, stage="tokenize"))


def open_activations(reference: str = "latest", *, root: Path | str | None = None) -> ShardReader:
    """A reader of an activation store: shuffled batches, rows by (prompt, position), a Dask array."""
    return ShardReader.of(artifacts(root).resolve(reference, stage="harvest"))


def open_sae(reference: str = "latest", *, root: Path | str | None = None) -> Autoencoder:
    """A trained autoencoder."""
    return load_autoencoder(artifacts(root).resolve(reference, stage="train"))
