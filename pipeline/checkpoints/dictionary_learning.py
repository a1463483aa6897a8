"""dictionary_learning folders: ``ae.pt`` and ``config.json``, in torch's Linear orientation.

Its ``AutoEncoder`` is our forward pass with one bias name for b_dec. Its loader rescales decoder rows to unit norm (and
the encoder inversely), so feature activations there differ from ours by those norms unless rows are of unit norm; the
reconstruction does not. Source: dictionary_learning's saved folders.
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints.values import Checkpoint, Provenance, autoencoder, integer, read_pt, read_settings, text
from sae.autoencoder import Autoencoder
from storage.errors import InputError
from storage.fingerprint import canonical_json

NAME = "dictionary_learning"
WEIGHTS, CONFIG = "ae.pt", "config.json"
_SITES = {
    "resid_post": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "mlp_post": "mlp.hook_post",
}


def find(place: Path) -> Path | None:
    """The folder with ``ae.pt``, given it, the file, or the folder of one trainer above."""
    folder = place.parent if place.name == WEIGHTS else place
    for candidate in (folder, folder / "trainer_0"):
        if (candidate / WEIGHTS).is_file():
            return candidate
    return None


def read(folder: Path) -> Checkpoint:
    """Reads a folder.

    Raises:
        InputError: another class of dictionary.
    """
    settings = read_settings(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    trainer: Mapping[str, Any] = settings["trainer"] if isinstance(settings.get("trainer"), dict) else {}
    kind = trainer.get("dict_class", "AutoEncoder")
    if kind != "AutoEncoder":
        raise InputError("not a ReLU autoencoder", where=folder / CONFIG, found=kind, expected="AutoEncoder")
    found = read_pt(folder / WEIGHTS)
    named = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "bias"}
    tensors = {ours: found[theirs] for ours, theirs in named.items() if theirs in found}
    tensors |= {name: tensors[name].T for name in ("W_enc", "W_dec") if name in tensors and tensors[name].ndim == 2}
    return Checkpoint(
        autoencoder(folder / WEIGHTS, tensors),
        NAME,
        tuple(path for path in (folder / CONFIG, folder / WEIGHTS) if path.is_file()),
        hook_name=_hook_name(trainer),
        language_model=text(trainer.get("lm_name")),
        settings=settings,
    )


def write(sae: Autoencoder, said: Provenance) -> dict[str, bytes]:
    """The files of a trainer's folder.

    Raises:
        InputError: the autoencoder does not subtract b_dec from its input, which this format has no word for.
    """
    if not sae.subtract_b_dec:
        raise InputError(
            "dictionary_learning's AutoEncoder subtracts its bias from the input, this autoencoder does not",
            remedy="export it as saelens",
        )
    state = {
        "bias": sae.b_dec,
        "encoder.weight": sae.W_enc.T,
        "encoder.bias": sae.b_enc,
        "decoder.weight": sae.W_dec.T,
    }
    weights = io.BytesIO()
    torch.save({name: tensor.detach().float().contiguous() for name, tensor in state.items()}, weights)
    config: dict[str, Any] = {
        "trainer": {
            "dict_class": "AutoEncoder",
            "trainer_class": "StandardTrainer",
            "activation_dim": sae.d_in,
            "dict_size": sae.d_sae,
            "layer": _layer(said.hook_name),
            "lm_name": said.language_model,
            "submodule_name": said.hook_name,
            "sparsemill_artifact": said.artifact_id,
        },
        "buffer": {"d_submodule": sae.d_in, "ctx_len": said.prompt_tokens},
    }
    return {CONFIG: canonical_json(config), WEIGHTS: weights.getvalue()}


def _hook_name(trainer: Mapping[str, Any]) -> str | None:
    name = text(trainer.get("submodule_name"))
    if name is None or name.startswith("blocks."):
        return name
    site = re.fullmatch(r"(.+?)(?:_layer_?(\d+))?", name)
    layer = integer(trainer.get("layer"))
    known = None if site is None else _SITES.get(site[1])
    return None if known is None or layer is None else f"blocks.{layer}.{known}"


def _layer(hook_name: str) -> int | None:
    found = re.match(r"blocks\.(\d+)\.", hook_name)
    return None if found is None else int(found[1])
