"""The post's own checkpoints: ``{n}.pt`` beside an optional ``{n}_cfg.json``.

Shapes come from the tensors; every key of the config is optional. Decoder norms stay as published. Source: the post's
public code, and the repository NeelNanda/sparse_autoencoder.
"""

from pathlib import Path
from typing import Any

from pipeline.checkpoints.values import Checkpoint, autoencoder, integer, read_pt, read_settings, text
from storage.errors import InputError

NAME = "author"
_SITES = {
    "post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
}


def find(place: Path) -> Path | None:
    """The checkpoint's ``.pt`` file, given it or a folder that holds just one."""
    if place.suffix == ".pt" and place.is_file():
        return None if place.name == "ae.pt" else place
    found = [path for path in sorted(place.glob("*.pt")) if path.name != "ae.pt"] if place.is_dir() else []
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:6])
        raise InputError(
            "the folder holds several checkpoints", where=place, found=names, remedy="name one of the files"
        )
    return found[0] if found else None


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint.

    Args:
        path: the ``.pt`` file.
    """
    config = path.with_name(f"{path.stem}_cfg.json")
    settings = read_settings(config) if config.is_file() else {}
    return Checkpoint(
        autoencoder(path, read_pt(path)),
        NAME,
        (path, config) if config.is_file() else (path,),
        hook_name=_hook_name(settings),
        language_model=text(settings.get("model_name")),
        train_tokens=integer(settings.get("num_tokens")),
        settings=settings,
    )


def _hook_name(settings: dict[str, Any]) -> str | None:
    if (named := text(settings.get("act_name"))) is not None:
        return named
    site, layer = text(settings.get("site")), integer(settings.get("layer"))
    if site is None or site not in _SITES:
        return None
    return f"blocks.{layer or 0}.{_SITES[site]}"
