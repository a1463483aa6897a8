"""An autoencoder's artifact -> a folder that another program loads."""

from pathlib import Path

import pyarrow.parquet as pq
import torch

from pipeline import training
from pipeline.checkpoints.formats import write_checkpoint
from pipeline.checkpoints.values import Provenance
from pipeline.workspace import Workspace, facts
from storage import atomic
from storage.artifact import Artifact
from storage.errors import InputError


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
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("the export's folder is not empty", where=folder, remedy="name a new one")
    files = write_checkpoint(name, training.load_autoencoder(sae), _provenance(sae, workspace))
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        atomic.write_file(folder / file, [data])
    return [folder / file for file in files]


def _provenance(sae: Artifact, workspace: Workspace) -> Provenance:
    said = training.settings(sae)
    if "activations" not in sae.parents:
        model = facts(sae)["language_model"] or facts(sae)["language_model_as_named"]
        return Provenance(sae.id, said["hook_name"], str(model), config=said["config"])
    activations = workspace.store.parent(sae, "activations")
    return Provenance(
        artifact_id=sae.id,
        hook_name=said["hook_name"],
        language_model=str(facts(activations)["language_model"]),
        prompt_tokens=int(facts(activations)["positions"]) + (0 if activations.config["include_bos"] else 1),
        include_bos=bool(activations.config["include_bos"]),
        config=said["config"],
        densities=_densities(sae, workspace),
    )


def _densities(sae: Artifact, workspace: Workspace) -> torch.Tensor | None:
    for analysis in workspace.store.list("analyze"):
        if analysis.config["analysis"] == "density" and analysis.parents["sae"] == sae.as_parent():
            table = pq.read_table(analysis.checked_file("tables/features.parquet"))
            return torch.from_numpy(table["density"].to_numpy().copy())
    return None
