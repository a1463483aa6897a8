"""The bytes of a sharded Zarr v3 array, written and checked without a Zarr library.

An array of n_rows rows is cut into shards (files) of ``shard_rows``, a shard into chunks of ``chunk_rows``. A shard
is its chunks in order, each followed by its crc32c, then an index of (offset, size) pairs, then the index's crc32c:
the codec ``sharding_indexed`` with inner codecs ``bytes`` (little endian) and ``crc32c``, index at the end. As no
chunk is compressed and none is left out, every shard of an array has the same size and the same index, so a reader
knows both beforehand and anything else is damage. Rejected: writing through zarr-python (it encodes chunk by chunk in
an event loop, several times slower than a plain write, and leaves out chunks of zeros unless told otherwise).
"""

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from typing import cast

import google_crc32c
import numpy as np
import numpy.typing as npt

from storage.errors import ConfigError
from storage.fingerprint import Json

METADATA_NAME = "zarr.json"
CRC_BYTES = 4
_WORTH_UNLOCKING_BYTES = 1 << 16  # from here on a call that lets other threads run takes less than they would wait
_INDEX_ENTRY_BYTES = 16  # a chunk's offset and size

_ZARR_TYPES = {"<f4": "float32", "<f2": "float16", "<u2": "uint16", "<u4": "uint32", "<i4": "int32", "|u1": "uint8"}


def crc32c(data: npt.NDArray[np.generic]) -> int:
    """CRC-32C of a C-contiguous array's bytes; about 15 GB/s, of large ones while other threads run."""
    native = _native_crc32c() if data.nbytes >= _WORTH_UNLOCKING_BYTES and data.flags.c_contiguous else None
    if native is None:
        return google_crc32c.value(cast("bytes", data))
    return native(data.__array_interface__["data"][0], data.nbytes)


@cache
def _native_crc32c() -> Callable[[int, int], int] | None:
    """The C function that google_crc32c calls, without Python's lock, which that lets go of for ``bytes`` alone."""
    try:
        library = ctypes.CDLL(import_module("google_crc32c._crc32c").__file__)
        function = library.crc32c_value
    except (ImportError, OSError, AttributeError):  # it runs in Python, or its C functions cannot be reached
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint32
    return cast("Callable[[int, int], int]", function)


@dataclass(frozen=True)
class ShardedArray:
    """The shape and format of one array of a store.

    Attributes:
        name: of the array in its group.
        dtype: little-endian numpy dtype of the stored values.
        n_rows: length of the first axis.
        shard_rows: rows a shard; divides ``n_rows``.
        chunk_rows: rows a chunk; divides ``shard_rows``.
        columns: length of the second axis, or None if there is none.
        dimensions: names of the axes.
        attributes: for people and other readers.
    """

    name: str
    dtype: np.dtype[np.generic]
    n_rows: int
    shard_rows: int
    chunk_rows: int
    columns: int | None = None
    dimensions: tuple[str, ...] = ("row",)
    attributes: dict[str, Json] = field(default_factory=dict[str, Json])

    def __post_init__(self) -> None:
        if self.n_rows % self.shard_rows or self.shard_rows % self.chunk_rows:
            raise ConfigError(
                "chunks must divide shards, and shards the array",
                where=self.name,
                found=f"{self.n_rows} rows, shards of {self.shard_rows}, chunks of {self.chunk_rows}",
            )

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row: ``()`` or ``(columns,)``."""
        return () if self.columns is None else (self.columns,)

    @property
    def n_shards(self) -> int:
        """Files of the array, metadata aside."""
        return self.n_rows // self.shard_rows

    @property
    def chunks_per_shard(self) -> int:
        """Chunks in one file."""
        return self.shard_rows // self.chunk_rows

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk without its checksum."""
        return self.chunk_rows * (self.columns or 1) * self.dtype.itemsize

    @cached_property
    def index(self) -> bytes:
        """The index at the end of every shard, with its checksum."""
        stride = self.chunk_bytes + CRC_BYTES
        pairs = np.empty((self.chunks_per_shard, 2), "<u8")
        pairs[:, 0] = np.arange(self.chunks_per_shard) * stride
        pairs[:, 1] = stride
        return pairs.tobytes() + _crc_bytes(crc32c(pairs))

    @property
    def shard_bytes(self) -> int:
        """Size of every shard's file."""
        return self.chunks_per_shard * (self.chunk_bytes + CRC_BYTES + _INDEX_ENTRY_BYTES) + CRC_BYTES

    def shard_name(self, shard: int) -> str:
        """File name of a shard, relative to the group: ``<array>/c/<shard>`` or ``<array>/c/<shard>/0``."""
        return f"{self.name}/c/{shard}" + ("" if self.columns is None else "/0")

    def metadata(self) -> bytes:
        """Contents of the array's ``zarr.json``."""
        return _json_bytes(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": [self.n_rows, *self.row_shape],
                "data_type": _ZARR_TYPES[self.dtype.str],
                "chunk_grid": _named("regular", chunk_shape=[self.shard_rows, *self.row_shape]),
                "chunk_key_encoding": _named("default", separator="/"),
                "fill_value": 0,
                "codecs": [
                    _named(
                        "sharding_indexed",
                        chunk_shape=[self.chunk_rows, *self.row_shape],
                        codecs=[self._bytes_codec(), {"name": "crc32c"}],
                        index_codecs=[_named("bytes", endian="little"), {"name": "crc32c"}],
                        index_location="end",
                    )
                ],
                "dimension_names": list(self.dimensions),
                "attributes": self.attributes,
            }
        )

    def _bytes_codec(self) -> dict[str, Json]:
        return {"name": "bytes"} if self.dtype.itemsize == 1 else _named("bytes", endian="little")


def group_metadata(attributes: dict[str, Json]) -> bytes:
    """Contents of a group's ``zarr.json``."""
    return _json_bytes({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def _named(name: str, **configuration: Json) -> dict[str, Json]:
    return {"name": name, "configuration": configuration}


def _crc_bytes(checksum: int) -> bytes:
    return checksum.to_bytes(CRC_BYTES, "little")


def _json_bytes(value: dict[str, Json]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
