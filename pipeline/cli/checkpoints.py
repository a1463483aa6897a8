"""``sparsemill import`` and ``sparsemill export``: autoencoders of other programs, and ours for them."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pipeline.cli.options import Home, finish, workspace_at
from pipeline.training import AUTOENCODER_STAGES


def import_checkpoint(
    source: str,
    *,
    activations: Annotated[str | None, Parameter(help="a harvest at its site: then every analysis runs on it")] = None,
    model: Annotated[str | None, Parameter(help="its language model, where there is no harvest")] = None,
    hook_name: Annotated[str | None, Parameter(help="its site, where the checkpoint does not say")] = None,
    home: Home = None,
) -> None:
    """Take in an autoencoder of another program: the post's own .pt, SAELens, dictionary_learning.

    Files are read as tensors alone; one that would run code is refused. Afterwards 'sparsemill analyze ID' runs what it
    can: with --activations everything, with --model what reads the model's weights, else what reads its own weights.

    Args:
        source: a file, a folder, or hf://owner/repository[@revision][/path].
    """
    from pipeline.checkpoints.importing import import_checkpoint as run

    workspace = workspace_at(None, home)
    harvest = None if activations is None else workspace.store.resolve(activations, stage="harvest")
    finish(run(source, workspace, activations=harvest, model=model, hook_name=hook_name).artifact)


def export(
    sae: str,
    folder: Path,
    *,
    format_: Annotated[str, Parameter(name="--format", help="saelens or dictionary_learning")] = "saelens",
    home: Home = None,
) -> None:
    """Write an autoencoder as another program keeps it.

    Args:
        sae: id, unique prefix or tag of an autoencoder, or 'latest'.
        folder: where to; new or empty.
    """
    from pipeline.checkpoints.exporting import export_autoencoder

    workspace = workspace_at(None, home)
    artifact = workspace.store.resolve(sae, stage=AUTOENCODER_STAGES)
    for path in export_autoencoder(artifact, format_, folder, workspace):
        print(path)
