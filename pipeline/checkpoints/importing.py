"""The import stage: another program's checkpoint -> an autoencoder's artifact that analyses take like a trained one.

With activations it has every analysis; with a language model alone those that read weights and held-out prompts of
none; with neither those that read its own weights. Layout of the artifact: as a training's, without its logs.
"""

from dataclasses import dataclass
from typing import Any

import safetensors.torch

from pipeline import language_model
from pipeline.checkpoints.formats import read_checkpoint
from pipeline.checkpoints.values import Checkpoint
from pipeline.training import SETTINGS, WEIGHTS
from pipeline.workspace import Workspace, facts
from sae.state import autoencoder_json, autoencoder_tensors
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.errors import ConfigError
from storage.fingerprint import Json, sha256_file

OUTPUT_VERSION = 1


@dataclass(frozen=True)
class Site:
    """Where an autoencoder belongs.

    Attributes:
        hook_name: its site.
        language_model: the model's name, or None where it is not at hand.
        identity: the model's hashes, or None likewise.
    """

    hook_name: str
    language_model: str | None
    identity: Any


def import_checkpoint(
    source: str,
    workspace: Workspace,
    *,
    activations: Artifact | None = None,
    model: str | None = None,
    hook_name: str | None = None,
) -> Made:
    """Makes, or finds, the artifact of a checkpoint.

    Args:
        source: a file, a folder, or ``hf://owner/repository[@revision][/path]``.
        workspace: where it happens.
        activations: a harvest at its site, for the analyses that read activations.
        model: the language model it belongs to, where there is no harvest.
        hook_name: its site, where the checkpoint does not say or says it wrongly.

    Raises:
        InputError: the checkpoint does not read.
        ConfigError: its site is not known, or is not that of the activations.
    """
    checkpoint = read_checkpoint(source)
    site = _site(checkpoint, activations, model, hook_name)
    files: dict[str, Json] = {path.name: sha256_file(path) for path in checkpoint.files}
    spec = Spec(
        "import",
        OUTPUT_VERSION,
        {"format": checkpoint.format, "files": files, "hook_name": site.hook_name, "model": site.identity},
        {} if activations is None else {"activations": activations.as_parent()},
    )

    def produce(staging: Staging) -> Result:
        said = {"hook_name": site.hook_name, "model": site.identity, "config": dict(checkpoint.settings)}
        staging.write_bytes(WEIGHTS, safetensors.torch.save(autoencoder_tensors(checkpoint.sae)))
        staging.write_json(SETTINGS, said | {"autoencoder": autoencoder_json(checkpoint.sae)})
        stats: dict[str, Json] = {
            "d_in": checkpoint.sae.d_in,
            "d_sae": checkpoint.sae.d_sae,
            "format": checkpoint.format,
            "language_model": site.language_model,
            "language_model_as_named": checkpoint.language_model,
            "rows_seen": checkpoint.train_tokens,
        }
        return Result(stats)

    return workspace.make(spec, produce)


def _site(checkpoint: Checkpoint, activations: Artifact | None, model: str | None, hook_name: str | None) -> Site:
    if activations is None:
        named = hook_name or checkpoint.hook_name
        if named is None:
            raise ConfigError(
                "the checkpoint does not say its site", where=str(checkpoint.files[0]),
                remedy="give --hook-name, such as blocks.0.mlp.hook_post",
            )  # fmt: skip
        return Site(named, model, None if model is None else language_model.identity(model))
    harvested, d_in = str(activations.config["hook_name"]), facts(activations)["d_in"]
    if checkpoint.sae.d_in != d_in:
        raise ConfigError(
            "the autoencoder is of another width than the activations", where=activations.id,
            found=checkpoint.sae.d_in, expected=d_in,
        )  # fmt: skip
    if (said := hook_name or checkpoint.hook_name or harvested) != harvested:
        raise ConfigError(
            "the autoencoder belongs to another site than the activations", where=activations.id,
            found=said, expected=harvested, remedy=f"give --hook-name {harvested} if the checkpoint is wrong",
        )  # fmt: skip
    if model is not None:
        raise ConfigError("the activations say which language model it is", found=model, remedy="leave out --model")
    return Site(harvested, str(facts(activations)["language_model"]), activations.config["model"])
