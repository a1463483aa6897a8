"""SAELens folders: ``sae_weights.safetensors`` and ``cfg.json``; our orientation, and our forward pass.

Only its standard (ReLU) architecture is one of ours; inputs that it rescales would need its code to be understood.
Source: SAELens 6's own saved folders, and 3 to 5's, whose names stand beside the sizes instead of under ``metadata``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

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
from storage.errors import InputError
from storage.fingerprint import canonical_json

NAME = "saelens"
WEIGHTS, CONFIG, SPARSITY = "sae_weights.safetensors", "cfg.json", "sparsity.safetensors"
FORMAT_VERSION = "6.0.0"
"""SAELens's version whose layout is written."""
_NEUTRAL = {"normalize_activations": "none", "reshape_activations": "none"}


def find(place: Path) -> Path | None:
    """The folder, given it or one of its files."""
    folder = place.parent if place.name in {WEIGHTS, CONFIG} else place
    return folder if (folder / WEIGHTS).is_file() else None


def read(folder: Path) -> Checkpoint:
    """Reads a folder.

    Raises:
        InputError: it is of an architecture, or rescales its inputs, that our autoencoder has not.
    """
    settings = read_settings(folder / CONFIG)
    kind = settings.get("architecture", "standard"), settings.get("activation_fn") or "relu"
    if kind != ("standard", "relu"):
        raise InputError("not a ReLU autoencoder", where=folder / CONFIG, found=kind, expected=("standard", "relu"))
    for name, neutral in _NEUTRAL.items():
        if (value := settings.get(name, neutral)) not in {neutral, None}:
            raise InputError(f"{name} is not supported", where=folder / CONFIG, found=value, expected=neutral)
    metadata: Mapping[str, Any] = settings["metadata"] if isinstance(settings.get("metadata"), dict) else settings
    subtract = settings.get("apply_b_dec_to_input", True)
    return Checkpoint(
        autoencoder(folder / WEIGHTS, read_safetensors(folder / WEIGHTS), subtract_b_dec=bool(subtract)),
        NAME,
        (folder / CONFIG, folder / WEIGHTS),
        hook_name=text(metadata.get("hook_name")),
        language_model=text(metadata.get("model_name")),
        train_tokens=integer(metadata.get("training_tokens")),
        settings=settings,
    )


def write(sae: Autoencoder, said: Provenance) -> dict[str, bytes]:
    """The files of a SAELens folder.

    Args:
        sae: the autoencoder.
        said: what its metadata say.
    """
    metadata: dict[str, Any] = {
        "sae_lens_version": FORMAT_VERSION,
        "model_name": said.language_model,
        "hook_name": said.hook_name,
        "hook_head_index": None,
        "context_size": said.prompt_tokens,
        "prepend_bos": said.bos,
        "seqpos_slice": None if said.include_bos is None else [None if said.include_bos else 1, None],
        "exclude_special_tokens": False,  # EOS inside a prompt is a row like any other
        "dataset_path": None,
        "training_tokens": said.train_tokens,
        "sparsemill_artifact": said.artifact_id,
        "sparsemill_config": dict(said.config),
    }
    config: dict[str, Any] = {
        "architecture": "standard",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        **_NEUTRAL,
        "metadata": metadata,
    }
    named = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in named.items()}
    files = {CONFIG: canonical_json(config), WEIGHTS: safetensors.torch.save(tensors)}
    if said.densities is not None:
        sparsity = torch.log10(said.densities.double() + 1e-10).float()
        files[SPARSITY] = safetensors.torch.save({"sparsity": sparsity})
    return files
