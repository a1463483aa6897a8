"""Plain folders: ``autoencoder.safetensors`` and ``config.json``, for any program; bits and decoder norms as they are.

``W_enc`` (d_in, d_sae), ``b_enc``, ``W_dec`` (d_sae, d_in) and ``b_dec``, float32: x becomes ``feature_acts = relu((x
- b_dec) @ W_enc + b_enc)`` (no subtraction if ``subtract_b_dec`` is false), and that ``feature_acts @ W_dec + b_dec``.
``densities.safetensors`` goes along where firings were counted: ``density`` float64 (d_sae,), fractions of tokens.
A published bundle (``pipeline.checkpoints.bundle``) begins with these files, so it is read here too.
"""

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch

from pipeline.checkpoints.values import (
    Checkpoint,
    Provenance,
    autoencoder,
    integer,
    read_safetensors,
    read_settings,
    text,
)
from sae.autoencoder import Autoencoder
from sae.state import autoencoder_json, autoencoder_tensors
from storage.errors import InputError
from storage.fingerprint import canonical_json, sha256_file
from storage.manifest import safe_name

NAME = "safetensors"
WEIGHTS, CONFIG, DENSITIES = "autoencoder.safetensors", "config.json", "densities.safetensors"
CHECKSUMS = "checksums.sha256"
"""Of a bundle, as ``sha256sum --check`` reads it."""
_FORMAT, _VERSION = "sparsemill-autoencoder", 1


def find(place: Path) -> Path | None:
    """The folder, given it or one of its files."""
    folder = place.parent if place.name in {WEIGHTS, CONFIG} else place
    return folder if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file() else None


def read(folder: Path) -> Checkpoint:
    """Reads a folder.

    Raises:
        InputError: its config is of another format, version or activation function; or, in a bundle, a file is not
            what the checksums say.
    """
    files = (folder / CONFIG, folder / WEIGHTS)
    if (folder / CHECKSUMS).is_file():
        check(folder, [path.name for path in files])
    settings = read_settings(folder / CONFIG)
    said = settings["autoencoder"] if isinstance(settings.get("autoencoder"), dict) else {}
    found = settings.get("format"), settings.get("format_version"), said.get("activation")
    if found != (expected := (_FORMAT, _VERSION, "relu")):
        raise InputError("not a ReLU autoencoder of this format", where=files[0], found=found, expected=expected)
    return Checkpoint(
        autoencoder(files[1], read_safetensors(files[1]), subtract_b_dec=bool(said.get("subtract_b_dec", True))),
        NAME,
        files,
        hook_name=text(settings.get("hook_name")),
        language_model=text(settings.get("language_model")),
        train_tokens=integer(settings.get("train_tokens")),
        settings=settings,
    )


def write(sae: Autoencoder, said: Provenance) -> dict[str, bytes]:
    """The files of a folder.

    Args:
        sae: the autoencoder.
        said: what its config says.
    """
    config = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "autoencoder": autoencoder_json(sae),
        "hook_name": said.hook_name,
        "language_model": said.language_model,
        "prompt_tokens": said.prompt_tokens,
        "include_bos": said.include_bos,
        "train_tokens": said.train_tokens,
        "artifact": said.artifact_id,
        "training": dict(said.config),
    }
    files = {CONFIG: canonical_json(config), WEIGHTS: safetensors.torch.save(autoencoder_tensors(sae))}
    if said.densities is not None:
        files[DENSITIES] = safetensors.torch.save({"density": said.densities.double().contiguous()})
    return files


def check(folder: Path, names: Sequence[str] | None = None) -> Sequence[str]:
    """Compares files of a bundle with its checksums.

    Args:
        folder: the bundle.
        names: which files; all by default.

    Returns:
        The names.

    Raises:
        InputError: a file is missing or another, or a name leaves the folder.
    """
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    known = {safe_name(name): digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in known if names is None else names:
        found = sha256_file(folder / name) if (folder / name).is_file() else "no such file"
        if found != known.get(name):
            raise InputError(
                "a file is not the one that was published", where=folder / name, found=found,
                expected=known.get(name), remedy="fetch the bundle again",
            )  # fmt: skip
    return list(known)
