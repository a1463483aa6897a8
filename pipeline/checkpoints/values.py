"""What a checkpoint of any format comes to, and the safe reading of its parts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.tensor_files import load_pt
from sae.autoencoder import Autoencoder
from sae.errors import InvalidTensor
from storage.errors import InputError

LARGEST_JSON = 2**24
"""Bytes of a config that is still read; those in circulation have a few hundred."""


@dataclass(frozen=True)
class Checkpoint:
    """An autoencoder as another program keeps it.

    Attributes:
        sae: the autoencoder, float32.
        format: one of ``FORMATS``.
        files: the files that were read.
        hook_name: the site, where the checkpoint says so.
        language_model: the model's name, where it says so.
        train_tokens: activations it was trained on, where it says so.
        settings: its own config as it came.
    """

    sae: Autoencoder
    format: str
    files: tuple[Path, ...]
    hook_name: str | None = None
    language_model: str | None = None
    train_tokens: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Provenance:
    """What an exported autoencoder says of itself.

    Attributes:
        artifact_id: which autoencoder it is.
        hook_name: its site.
        language_model: the model's name.
        prompt_tokens: length of the prompts it was trained on, where known.
        include_bos: whether the first position, BOS or not, was among them, where known.
        config: its training's config.
        train_tokens: activations it was trained on, where known.
        densities: how often each feature fires, float64 (d_sae,), where that was measured.
        bos: whether the prompts began with BOS, where known.
    """

    artifact_id: str
    hook_name: str
    language_model: str
    prompt_tokens: int | None = None
    include_bos: bool | None = None
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    train_tokens: int | None = None
    densities: torch.Tensor | None = None
    bos: bool | None = None


def autoencoder(where: Path, tensors: Mapping[str, torch.Tensor], *, subtract_b_dec: bool = True) -> Autoencoder:
    """An autoencoder of tensors W_enc, b_enc, W_dec, b_dec in any floating type.

    Raises:
        InputError: a tensor is missing, of another type or shape, or not finite.
    """
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(
            "the checkpoint lacks tensors",
            where=where,
            found=", ".join(sorted(tensors)) or "none",
            expected=", ".join(names),
        )
    for name in names:
        if not tensors[name].is_floating_point():
            raise InputError(f"tensor {name} is not of a floating type", where=where, found=tensors[name].dtype)
        if not bool(torch.isfinite(tensors[name]).all()):
            raise InputError(f"tensor {name} holds values that are not finite", where=where)
    parts = (tensors[name].detach().cpu().float().contiguous() for name in names)
    try:
        return Autoencoder(*parts, subtract_b_dec=subtract_b_dec)
    except InvalidTensor as error:
        raise InputError("shapes of the checkpoint's tensors do not agree", where=where, found=str(error)) from error


def read_pt(path: Path) -> Mapping[str, torch.Tensor]:
    """Tensors of a ``.pt`` file; one that holds anything else is refused before any of it runs.

    Raises:
        InputError: no such file, or not a file of tensors alone.
    """
    found = load_pt(_present(path))
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise InputError("the .pt file holds no state dict", where=path, expected="tensors by name")
    return found


def read_safetensors(path: Path) -> Mapping[str, torch.Tensor]:
    """Tensors of a safetensors file.

    Raises:
        InputError: no such file, or a damaged one.
    """
    try:
        return load_file(_present(path))
    except SafetensorError as error:
        raise InputError("the safetensors file does not read", where=path, found=_first_line(error)) from error


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: no such file, or not a JSON object of a sensible size.
    """
    if _present(path).stat().st_size > LARGEST_JSON:
        raise InputError("the config is too large to be one", where=path, found=f"{path.stat().st_size:,} bytes")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError("the config does not read", where=path, found=_first_line(error)) from error
    if not isinstance(found, dict):
        raise InputError("the config is no JSON object", where=path)
    return found


def integer(value: object) -> int | None:
    """A whole number as configs write it (2e9 among them), or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return None
    return int(value)


def text(value: object) -> str | None:
    """A name, or None."""
    return value if isinstance(value, str) and value else None


def _present(path: Path) -> Path:
    if not path.is_file():
        raise InputError("a file of the checkpoint is not there", where=path)
    return path


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
