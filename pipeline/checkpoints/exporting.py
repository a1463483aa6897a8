"""An autoencoder's artifact -> a folder that another program loads, or one to publish."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import torch

from pipeline import training
from pipeline.checkpoints.formats import write_checkpoint
from pipeline.checkpoints.values import Provenance
from pipeline.workspace import Workspace, facts
from storage import atomic
from storage.artifact import Artifact
from storage.errors import ArtifactNotFound, InputError


def export_autoencoder(sae: Artifact, name: str, folder: Path, workspace: Workspace) -> list[Path]:
    """Writes an autoencoder as another program keeps it.

    Densities go along where the store has a density analysis of it.

    Args:
        sae: an artifact of ``training.AUTOENCODER_STAGES``.
        name: the format.
        folder: new, or empty.
        workspace: where parents and analyses are looked for.

    Returns:
        The files written.

    Raises:
        InputError: no such format, or the folder is not empty.
    """
    require_empty(folder)
    return write_folder(folder, checkpoint_files(sae, name, _density_analysis(sae, workspace), workspace))


def checkpoint_files(sae: Artifact, name: str, density: Artifact | None, workspace: Workspace) -> dict[str, bytes]:
    """The files of an autoencoder in a format, by name.

    Args:
        sae: an artifact of ``training.AUTOENCODER_STAGES``.
        name: the format.
        density: its density analysis, where there is one.
        workspace: where parents are looked for.
    """
    return write_checkpoint(name, training.load_autoencoder(sae), _provenance(sae, density, workspace))


def require_empty(folder: Path) -> None:
    """Raises ``InputError`` where an export would mix with what is there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("the export's folder is not empty", where=folder, remedy="name a new one")


def write_folder(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Writes files by their names, relative POSIX paths, to a new folder that is there whole or not at all.

    What a killed export left beside it, in ``.NAME.partial``, is removed.
    """
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    atomic.remove_tree(partial)
    for name, data in files.items():
        atomic.make_folder((partial / name).parent)
        atomic.write_file(partial / name, [data])
    atomic.sync_files([partial / name for name in files], top=partial)
    atomic.rename(partial, folder)
    return [folder / name for name in files]


def _provenance(sae: Artifact, density: Artifact | None, workspace: Workspace) -> Provenance:
    said = training.settings(sae)
    rows = facts(sae)["rows_seen"]
    if "activations" not in sae.parents:
        model = facts(sae)["language_model"] or facts(sae)["language_model_as_named"]
        return Provenance(sae.id, said["hook_name"], str(model), config=said["config"], train_tokens=rows)
    activations = workspace.store.parent(sae, "activations")
    return Provenance(
        artifact_id=sae.id,
        hook_name=said["hook_name"],
        language_model=str(facts(activations)["language_model"]),
        prompt_tokens=int(facts(activations)["positions"]) + (0 if activations.config["include_bos"] else 1),
        include_bos=bool(activations.config["include_bos"]),
        config=said["config"],
        train_tokens=rows,
        densities=None if density is None else _densities(density),
        bos=_begins_with_bos(activations, workspace),
    )


def _begins_with_bos(activations: Artifact, workspace: Workspace) -> bool | None:
    """Whether a harvest's prompts do; None where they are not at hand."""
    with suppress(ArtifactNotFound):
        return facts(workspace.store.parent(activations, "tokens"))["bos_id"] is not None
    return None


def _density_analysis(sae: Artifact, workspace: Workspace) -> Artifact | None:
    for analysis in workspace.store.list("analyze"):
        if analysis.config["analysis"] == "density" and analysis.parents["sae"] == sae.as_parent():
            return analysis
    return None


def _densities(density: Artifact) -> torch.Tensor:
    table = pq.read_table(density.checked_file("tables/features.parquet"))
    return torch.from_numpy(table["density"].to_numpy().copy())
