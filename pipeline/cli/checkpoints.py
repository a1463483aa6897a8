"""``sparsemill import`` and ``sparsemill export``: autoencoders of other programs, and ours for them."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pipeline.cli.options import Home, finish, workspace_at
from storage.errors import ConfigError


def import_checkpoint(
    source: str,
    *,
    activations: Annotated[str | None, Parameter(help="a harvest at its site: then every analysis runs on it")] = None,
    model: Annotated[str | None, Parameter(help="its language model, where there is no harvest")] = None,
    hook_name: Annotated[str | None, Parameter(help="its site, where the checkpoint does not say")] = None,
    home: Home = None,
) -> None:
    """Take in an autoencoder of another program: the post's own .pt, SAELens, dictionary_learning, a plain folder.

    Files are read as tensors alone; one that would run code is refused. Afterwards 'sparsemill analyze ID' runs what it
    can: with --activations everything, with --model what reads the model's weights, else what reads its own weights.

    For instance: sparsemill import hf://NeelNanda/sparse_autoencoder/25.pt --activations latest; sparsemill import
    my-sae --model gelu-1l.

    Args:
        source: a file, a folder, or hf://owner/repository[@revision][/path].
    """
    from pipeline.checkpoints.importing import import_checkpoint as run

    workspace = workspace_at(None, home)
    harvest = None if activations is None else workspace.store.resolve(activations, stage="harvest")
    finish(run(source, workspace, activations=harvest, model=model, hook_name=hook_name).artifact)


def export(
    reference: str,
    folder: Path,
    *,
    format_: Annotated[
        str | None,
        Parameter(name="--format", help="safetensors, saelens, dictionary_learning; saelens by default"),
    ] = None,
    bundle: Annotated[
        bool, Parameter(negative=(), help="with densities, feature table, report, lineage and a card: to publish")
    ] = False,
    home: Home = None,
) -> None:
    """Write an autoencoder as another program keeps it, or as a folder to publish.

    For instance: sparsemill export latest out --format safetensors; sparsemill export report-16b2 published --bundle;
    sparsemill push published hf://owner/name.

    Args:
        reference: id, unique prefix or tag of an autoencoder or of the report on it, or 'latest'.
        folder: where to; new or empty.
    """
    from pipeline.checkpoints import plain, saelens
    from pipeline.checkpoints.bundle import export_bundle
    from pipeline.checkpoints.exporting import export_autoencoder
    from pipeline.training import AUTOENCODER_STAGES

    workspace = workspace_at(None, home)
    artifact = workspace.store.resolve(reference, stage=(*AUTOENCODER_STAGES, "report"))
    if bundle:
        if format_ not in {None, plain.NAME}:
            raise ConfigError("a bundle is in one format", found=f"--format {format_}", expected=plain.NAME)
        written = export_bundle(artifact, folder, workspace)
    else:
        sae = workspace.store.parent(artifact, "sae") if artifact.stage == "report" else artifact
        written = export_autoencoder(sae, format_ or saelens.NAME, folder, workspace)
    for path in written:
        print(path)
