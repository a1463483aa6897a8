"""The public API of a notebook: open what a run made, by any name it answers to.

A *reference* is an id, the unique beginning of one, a tag, ``latest`` (of the kind that is asked for), the path of an
artifact's folder, or ``URL/STAGE/ID`` of one in a remote. Artifacts are looked for in ``root``, by default the folder
that SPARSEMILL_HOME names, else ``./artifacts``; a whole id also in the remote that SPARSEMILL_REMOTE names. What is
not there, or could be several, is an ``ArtifactNotFound`` or ``AmbiguousReference``, what is damaged a
``CorruptArtifact``; each is a :class:`SparsemillError`. ``examples/activation_store.ipynb`` shows the stores at work,
``examples/autoencoder_features.ipynb`` the autoencoders.

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

    Its features: what fires on a text, what one does to the logits, and where it fires most:

    >>> features = sparsemill.open_features("latest")
    >>> feature = features.firing("word_3 word_5 word_8")["feature"][0].as_py()
    >>> logits, best = features.logits(feature), features.examples(feature)
"""

from pathlib import Path

from pipeline.analyzing import Inputs
from pipeline.checkpoints.exporting import export_autoencoder
from pipeline.checkpoints.formats import is_checkpoint, read_checkpoint
from pipeline.checkpoints.importing import import_checkpoint
from pipeline.config import Runtime, load_preset, preset_names
from pipeline.features import Example, Examples, Features
from pipeline.harvest import moments
from pipeline.language_model import LanguageModel
from pipeline.language_model import load as load_language_model
from pipeline.statistics import Moments
from pipeline.texts import Excerpt, Highlighted, Texts, texts_of
from pipeline.tokens import TokenTable
from pipeline.torch_batches import TorchBatch, TorchBatches, to_device
from pipeline.training import AUTOENCODER_STAGES, load_autoencoder
from pipeline.workspace import Workspace
from sae.autoencoder import Autoencoder
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore
from storage.errors import SparsemillError
from storage.reader import Batch, BatchOrder, ReadState, ShardReader

__all__ = [
    "artifacts",
    "open_activations",
    "open_texts",
    "open_statistics",
    "open_sae",
    "open_features",
    "export_sae",
    "open_tokens",
    "load_language_model",
    "load_preset",
    "preset_names",
    "to_device",
    "Artifact",
    "ArtifactStore",
    "Autoencoder",
    "Batch",
    "BatchOrder",
    "Example",
    "Examples",
    "Excerpt",
    "Features",
    "Highlighted",
    "LanguageModel",
    "Moments",
    "ReadState",
    "ShardReader",
    "SparsemillError",
    "Texts",
    "TokenTable",
    "TorchBatch",
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
    return _workspace(root).store


def open_activations(reference: str = "latest", *, root: Path | str | None = None) -> ShardReader:
    """A reader of an activation store: shuffled batches, rows by (prompt, position), a Dask array.

    Args:
        reference: of a harvest. One of a remote is read where it is, chunk by chunk.
        root: of the artifact store.
    """
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
    """What a harvest measured of its rows: mean, minimum and maximum of each neuron, singular vectors.

    Args:
        reference: of the harvest.
        root: of the artifact store.
    """
    return moments(artifacts(root).resolve(reference, stage="harvest"))


def open_sae(reference: str = "latest", *, root: Path | str | None = None) -> Autoencoder:
    """An autoencoder: float32 tensors on the CPU.

    Args:
        reference: of one trained here or imported; or a checkpoint as :func:`open_features` takes it, which is read,
            not imported.
        root: of the artifact store.
    """
    if is_checkpoint(reference):
        return read_checkpoint(reference).sae
    return load_autoencoder(artifacts(root).resolve(reference, stage=AUTOENCODER_STAGES))


def open_features(
    reference: str = "latest",
    *,
    activations: str | None = None,
    model: str | None = None,
    hook_name: str | None = None,
    root: Path | str | None = None,
) -> Features:
    """The features of an autoencoder: which fire on a text, and what each does.

    Args:
        reference: of an autoencoder; or a checkpoint, which is imported first: the post's ``{n}.pt``, a SAELens or
            dictionary_learning folder, a path with a slash in it or ``hf://owner/repository[@revision][/path]``.
        activations: of a checkpoint: reference of a harvest at its site, in which examples are looked for.
        model: of a checkpoint without one: the language model, such as ``gelu-1l``.
        hook_name: of a checkpoint that does not say it: its site.
        root: of the artifact store.

    Raises:
        InputError: the checkpoint is not one that can be read.
    """
    workspace = _workspace(root)
    if not is_checkpoint(reference):
        return Features(Inputs(workspace.store.resolve(reference, stage=AUTOENCODER_STAGES), {}, workspace))
    harvest = None if activations is None else workspace.store.resolve(activations, stage="harvest")
    made = import_checkpoint(reference, workspace, activations=harvest, model=model, hook_name=hook_name)
    return Features(Inputs(made.artifact, {}, workspace))


def export_sae(
    reference: str, folder: Path | str, kind: str = "saelens", *, root: Path | str | None = None
) -> list[Path]:
    """Writes an autoencoder as another program keeps it.

    Args:
        reference: of the autoencoder.
        folder: new, or empty.
        kind: ``saelens``, ``dictionary_learning``, or ``safetensors`` for a plain folder.
        root: of the artifact store.

    Returns:
        The files.

    Raises:
        InputError: there is no such kind, or something in the folder.
    """
    workspace = _workspace(root)
    return export_autoencoder(
        workspace.store.resolve(reference, stage=AUTOENCODER_STAGES), kind, Path(folder), workspace
    )


def open_tokens(reference: str = "latest", *, root: Path | str | None = None) -> TokenTable:
    """The prompts of a tokens artifact.

    Args:
        reference: of the tokens artifact.
        root: of the artifact store.
    """
    return TokenTable(artifacts(root).resolve(reference, stage="tokenize"))


def _workspace(root: Path | str | None) -> Workspace:
    return Workspace.open(Runtime() if root is None else Runtime(root=Path(root)))
