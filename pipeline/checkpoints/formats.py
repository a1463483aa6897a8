"""Which format a checkpoint is in, and where it comes from: a file, a folder, or ``hf://owner/repository/path``."""

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from pipeline.checkpoints import author, dictionary_learning, plain, saelens
from pipeline.checkpoints.values import Checkpoint, Provenance
from sae.autoencoder import Autoencoder
from storage.errors import InputError
from storage.manifest import MANIFEST_NAME

_READERS: Mapping[str, tuple[Callable[[Path], Path | None], Callable[[Path], Checkpoint]]] = {
    saelens.NAME: (saelens.find, saelens.read),
    dictionary_learning.NAME: (dictionary_learning.find, dictionary_learning.read),
    author.NAME: (author.find, author.read),
    plain.NAME: (plain.find, plain.read),
}
_WRITERS: Mapping[str, Callable[[Autoencoder, Provenance], dict[str, bytes]]] = {
    saelens.NAME: saelens.write,
    dictionary_learning.NAME: dictionary_learning.write,
    plain.NAME: plain.write,
}
FORMATS = tuple(_WRITERS)
"""Formats that can be written; the post's own is read alone."""
_HUB = "hf://"


def is_checkpoint(reference: str) -> bool:
    """Whether a name means another program's checkpoint: ``hf://...``, a ``.pt`` file, a path that is no artifact's."""
    if "://" in reference or not ("/" in reference or reference.startswith((".", "~"))):
        return reference.startswith(_HUB) or reference.endswith(".pt")
    return not (Path(reference).expanduser() / MANIFEST_NAME).is_file()


def read_checkpoint(source: str) -> Checkpoint:
    """Reads a checkpoint of any format that is known here.

    Args:
        source: a file, a folder, or ``hf://owner/repository[@revision][/path]``, looked for in the Hub's cache first.

    Raises:
        InputError: nothing there that is known, or a file that is not what it should be.
        RemoteError: the Hub has trouble that may pass.
    """
    place = _from_hub(source) if source.startswith(_HUB) else Path(source).expanduser()
    if not place.exists():
        raise InputError("no such checkpoint", where=place)
    for find, read in _READERS.values():
        found = find(place)
        if found is not None:
            return read(found)
    raise InputError(
        "no checkpoint of a known format", where=place,
        expected="sae_weights.safetensors + cfg.json, ae.pt + config.json, {n}.pt + {n}_cfg.json, "
        "or autoencoder.safetensors + config.json",
    )  # fmt: skip


def write_checkpoint(name: str, sae: Autoencoder, said: Provenance) -> dict[str, bytes]:
    """Files of an autoencoder in another program's format, by name.

    Raises:
        InputError: no such format, or one that cannot hold this autoencoder.
    """
    if name not in _WRITERS:
        raise InputError("no such format", found=name, expected=", ".join(_WRITERS))
    return _WRITERS[name](sae, said)


def _from_hub(source: str) -> Path:
    from pipeline.hub_reading import asking, reason, snapshot

    parts = PurePosixPath(source.removeprefix(_HUB)).parts
    if len(parts) < 2 or ".." in parts:
        raise InputError("not a place on the Hub", found=source, expected="hf://owner/repository[@revision][/path]")
    repository, _, revision = "/".join(parts[:2]).partition("@")
    path = "/".join(parts[2:])
    beside = f"{path.removesuffix('.pt')}_cfg.json"
    try:
        wanted = [path, f"{path}/*", beside] if path else None
        with asking(source):
            return snapshot(repository, "model", revision or None, wanted) / path
    except (OSError, ValueError) as error:
        raise InputError(
            "the checkpoint is not to be had", where=source, found=reason(error),
            remedy="check the name and the network, or fill the Hub cache and set HF_HUB_OFFLINE=1",
        ) from None  # fmt: skip
