"""Canonical JSON -> sha256: equal values have equal fingerprints, in every process and on every machine.

Keys are sorted, floats are written as Python's shortest form that reads back exactly, text is UTF-8. What has no stable
form is refused, never passed through ``str``: NaN and infinities, sets, bytes, paths, numpy scalars, keys that are not
strings. ``1`` and ``1.0`` differ, so configs must coerce numbers to their field's type first (pydantic does).
Rejected: pickle or repr (neither is stable), RFC 8785 (it reads integers as doubles, which merges seeds above 2^53).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

from storage.errors import InputError, naming

Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | int | float | bool | None"
"""What JSON can say."""

_READ_BYTES = 1 << 20


def canonical_json(value: Json) -> bytes:
    """Serialises a value to the one byte string that stands for it.

    Args:
        value: mappings with string keys, lists or tuples, strings, integers, finite floats, booleans, None.

    Returns:
        UTF-8 JSON without spaces or a final newline, keys sorted by code point.

    Raises:
        InputError: a part of the value has no stable form; the message names its place.
    """
    return json.dumps(_plain(value, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def fingerprint(value: Json) -> str:
    """sha256 of the canonical JSON of a value, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def without_signed_zeros(value: Json) -> Any:
    """A value with 0.0 for each -0.0, which is equal to it but is written otherwise: equal questions have one id."""
    if isinstance(value, Mapping):
        return {key: without_signed_zeros(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_signed_zeros(item) for item in value]
    return value + 0.0 if type(value) is float else value


def seal_json(body: Mapping[str, Json]) -> bytes:
    """Canonical JSON of an object with one more field, ``checksum``: the fingerprint of the rest."""
    return canonical_json({**body, "checksum": fingerprint(body)})


def unseal_json(data: bytes) -> dict[str, Json]:
    """Reads what :func:`seal_json` wrote, without the checksum.

    Raises:
        ValueError: the bytes are anything else, even by a space.
    """
    value = json.loads(data)
    if not isinstance(value, dict) or "checksum" not in value:
        raise ValueError("not a JSON object with a checksum")
    body = {key: item for key, item in cast("dict[str, Json]", value).items() if key != "checksum"}
    if seal_json(body) != data:
        raise ValueError("the checksum does not match the contents")
    return body


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, as 64 hexadecimal digits; reads it once, in constant memory.

    Raises:
        OSError: the disk does not give them; it names the file.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file, naming(path):
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def sha256_pieces(pieces: Iterable[object]) -> str:
    """sha256 of buffers laid end to end, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(memoryview(cast("bytes", piece)).cast("B"))
    return digest.hexdigest()


def _plain(value: object, place: str) -> object:
    # Exact types: a subclass (numpy.float64 is a float, an enum may be a str) need not serialise as its base does.
    kind = type(value)
    if value is None or kind in (bool, int):
        return value
    if kind is str:
        return _checked_text(cast("str", value), place)
    if kind is float:
        if not math.isfinite(cast("float", value)):
            raise InputError("a number that is not finite has no canonical form", where=place, found=value)
        return value
    if isinstance(value, Mapping):
        return _plain_mapping(cast("Mapping[object, object]", value), place)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{i}]") for i, item in enumerate(cast("Sequence[object]", value))]
    raise InputError("a value of this type has no canonical form", where=place, found=kind.__name__)


def _plain_mapping(value: Mapping[object, object], place: str) -> dict[str, object]:
    plain: dict[str, object] = {}
    for key, item in value.items():
        if type(key) is not str:
            raise InputError("a key that is not a string has no canonical form", where=place, found=repr(key))
        plain[_checked_text(key, place)] = _plain(item, f"{place}.{key}")
    return plain


def _checked_text(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("text with unpaired surrogates has no UTF-8 form", where=place, found=repr(text)) from error
    return text
