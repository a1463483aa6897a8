"""One window of prompts -> shuffled shards of a Zarr v3 group.

The group ``store.zarr`` of an artifact holds ``activations`` (n_rows, d_in), a shard a file, P rows each; ``prompt``
and ``position`` (n_rows,), a window a file, so that every row knows its token; for uint8 ``scale`` (n_rows, 2); and
``checksum`` (n_chunks, 3 or 4), the crc32c of each chunk of the others. A chunk's own trailing crc32c says that its
bytes are whole; the one in ``checksum`` says that it is the chunk that belongs there, so a swapped file is not read
silently.

A window's files depend on the layout without ``n_windows`` and on the window's number, nothing else, so a longer
harvest has the same files. A window is filled in memory, in images of its files (storage.images), and written shard by
shard. Rejected: writing rows where they belong on disk as they come (random writes of a row each), and shuffling
afterwards (everything written twice).
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from storage import atomic
from storage.encoding import DECODING, ENCODINGS, Encoding, Floats, encode, stored_dtype
from storage.errors import ConfigError, InputError, NumericsError
from storage.fingerprint import Json
from storage.images import RunningSums, ShardImages, image_bytes
from storage.manifest import FORMAT_VERSION, MAX_FILES, FileRecord
from storage.shuffle import prompt_order, window_places
from storage.zarr_files import METADATA_NAME, ShardedArray, group_metadata

__all__ = ["GROUP_NAME", "Layout", "WindowBuffer", "create_group", "prompt_order"]

GROUP_NAME = "store.zarr"
_OTHER_FILES = 8  # a window, at most, beside its activations: prompts, positions, scales, checksums, its statistics...


@dataclass(frozen=True)
class Layout:
    """The shape of an activation store.

    Attributes:
        n_windows: windows harvested.
        window_prompts: P, prompts a window, and rows a shard.
        positions: L, harvested positions a prompt, and shards a window.
        d_in: width of an activation.
        chunk_rows: rows a chunk; divides ``window_prompts``.
        encoding: how activations are kept.
        seed: of the shuffle.
        n_prompts: training prompts of the tokens artifact; what windows leave over is not harvested.
        first_position: the prompt position of the first harvested one: 1 leaves BOS out, 0 keeps it.
    """

    n_windows: int
    window_prompts: int
    positions: int
    d_in: int
    chunk_rows: int
    encoding: Encoding
    seed: int
    n_prompts: int
    first_position: int = 1

    def __post_init__(self) -> None:
        sizes = (self.n_windows, self.window_prompts, self.positions, self.d_in, self.chunk_rows)
        if min(sizes) < 1 or self.first_position < 0:
            raise ConfigError("sizes of a store are at least 1", found=self)
        if self.encoding not in ENCODINGS:
            raise ConfigError("unknown encoding", found=repr(self.encoding), expected=" | ".join(ENCODINGS))
        if self.window_prompts % self.chunk_rows:
            raise ConfigError(
                "chunk_rows must divide window_prompts", found=f"{self.chunk_rows} and {self.window_prompts}"
            )
        if self.n_windows * self.window_prompts > self.n_prompts or self.n_prompts >= 2**31:
            raise ConfigError(
                "the windows need more prompts than there are",
                found=f"{self.n_windows} windows of {self.window_prompts}",
                expected=f"at most {self.n_prompts} prompts, fewer than 2^31",
            )
        if self.first_position + self.positions > 2**16:
            raise ConfigError("positions are kept in 16 bits", found=self.first_position + self.positions)

    @property
    def window_rows(self) -> int:
        """Rows a window."""
        return self.window_prompts * self.positions

    @property
    def n_rows(self) -> int:
        """Rows of the store."""
        return self.n_windows * self.window_rows

    @property
    def n_shards(self) -> int:
        """Files that hold activations."""
        return self.n_windows * self.positions

    @property
    def n_chunks(self) -> int:
        """Chunks of activations."""
        return self.n_rows // self.chunk_rows

    @property
    def bytes(self) -> int:
        """Size of all shard files; the few metadata files add some kilobytes."""
        return sum(array.n_shards * array.shard_bytes for array in self.arrays().values())

    @property
    def window_buffer_bytes(self) -> int:
        """Memory that a :class:`WindowBuffer` takes."""
        return sum(image_bytes(array) * array.n_shards // self.n_windows for array in self.arrays().values())

    def require_storable(self) -> None:
        """Checks that an artifact may have so many files.

        Raises:
            ConfigError: it may not.
        """
        files = self.n_windows * (self.positions + _OTHER_FILES)
        if files > MAX_FILES:
            raise ConfigError(
                "more files than an artifact may have",
                found=f"{files:,}, in {self.n_windows:,} windows",
                expected=f"at most {MAX_FILES:,}",
                remedy="choose larger windows (harvest.window_prompts), or fewer (harvest.n_windows)",
            )

    def to_json(self) -> dict[str, Json]:
        """The layout as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> "Layout":
        """Reads :meth:`to_json` of a store back; ``TypeError`` or ``ConfigError`` where it is something else."""
        layout = cls(**cast("dict[str, int]", value))  # pyright: ignore[reportArgumentType]  (encoding is checked)
        layout.require_storable()
        return layout

    def arrays(self) -> dict[str, ShardedArray]:
        """The arrays of the group by name; ``checksum`` is the last."""
        decoding: dict[str, Json] = {"encoding": self.encoding, "decode": DECODING[self.encoding]}
        rows, window, chunk = self.n_rows, self.window_rows, self.chunk_rows
        arrays = [
            ShardedArray(
                "activations",
                cast("np.dtype[np.generic]", stored_dtype(self.encoding)),
                rows,
                self.window_prompts,
                chunk,
                self.d_in,
                ("row", "neuron"),
                decoding,
            ),
            ShardedArray("prompt", np.dtype("<i4"), rows, window, chunk),
            ShardedArray("position", np.dtype("<u2"), rows, window, chunk),
        ]
        if self.encoding == "uint8":
            columns: dict[str, Json] = {"columns": ["step", "zero"]}
            arrays.append(ShardedArray("scale", np.dtype("<f4"), rows, window, chunk, 2, ("row", "scale"), columns))
        names = [array.name for array in arrays]
        per_window = window // chunk
        arrays.append(
            ShardedArray(
                "checksum",
                np.dtype("<u4"),
                self.n_chunks,
                per_window,
                per_window,
                len(names),
                ("chunk", "array"),
                {
                    "columns": names,
                    "checksum": "crc32c of the chunk of each array that starts at row chunk * chunk_rows",
                },
            )
        )
        return {array.name: array for array in arrays}


def create_group(folder: Path, layout: Layout, *, group: str = GROUP_NAME) -> list[str]:
    """Writes the metadata of a store.

    Args:
        folder: the artifact's (staging) folder.
        layout: of the store.
        group: folder of the Zarr group within it.

    Returns:
        Names of the files written, relative to ``folder``.

    Raises:
        ConfigError: it would be more files than an artifact may have.
    """
    layout.require_storable()
    attributes: dict[str, Json] = {"sparsemill": {"format_version": FORMAT_VERSION, "layout": layout.to_json()}}
    files = {METADATA_NAME: group_metadata(attributes)}
    files |= {f"{name}/{METADATA_NAME}": array.metadata() for name, array in layout.arrays().items()}
    for name, data in files.items():
        path = folder / group / name
        atomic.make_folder(path.parent, durable=False)
        atomic.write_file(path, [data])
    return [f"{group}/{name}" for name in files]


class WindowBuffer:
    """One window's rows, each at its place in the shuffled shards, until all are there and it is written.

    Different threads may add different prompts at once.

    Args:
        layout: of the store.
        window: which of its windows.
        prompts: the window's prompt numbers, int (window_prompts,); from ``prompt_order`` if None.
        reuse: a buffer of the same layout that is no longer wanted, whose memory this one takes: memory that was
            written before need not be zeroed by the kernel page by page again.
    """

    def __init__(
        self,
        layout: Layout,
        window: int,
        prompts: npt.NDArray[np.integer] | None = None,
        *,
        reuse: "WindowBuffer | None" = None,
    ):
        if not 0 <= window < layout.n_windows:
            raise ConfigError("no such window", found=window, expected=f"0 to {layout.n_windows - 1}")
        size = layout.window_prompts
        if prompts is None:
            prompts = prompt_order(layout.seed, layout.n_prompts)[window * size : (window + 1) * size]
        if prompts.shape != (size,):
            raise ConfigError("a window has exactly its prompts", found=prompts.shape, expected=(size,))
        self.layout = layout
        self.window = window
        self.prompts = prompts.astype(np.int64)
        self._arrays = layout.arrays()
        self._places = window_places(layout.seed, window, size, layout.positions)
        self._present = np.zeros(size, np.bool_)
        self._images = _new_images(layout) if reuse is None else reuse.give_up(layout)
        places, position = self._places.reshape(-1), np.arange(layout.positions) + layout.first_position
        self._images["prompt"].put(places, np.repeat(self.prompts.astype("<i4"), layout.positions))
        self._images["position"].put(places, np.tile(position.astype("<u2"), size))

    def add(self, first_prompt: int, rows: Floats) -> None:
        """Encodes the activations of some prompts and puts each row at its place.

        Args:
            first_prompt: index within the window of the first of these prompts.
            rows: float32 (n, positions, d_in): n consecutive prompts of the window.

        Raises:
            NumericsError: a value is not finite or overflows the encoding; names its prompt and position.
            InputError: prompts outside the window, or added before.
        """
        layout = self.layout
        if rows.shape[1:] != (layout.positions, layout.d_in):
            raise InputError("rows of another shape", found=rows.shape, expected=("n", layout.positions, layout.d_in))
        self._taken(first_prompt, len(rows))
        self.place(first_prompt, *self._encode(first_prompt, rows))

    def place(self, first_prompt: int, codes: npt.NDArray[np.generic], scale: Floats | None = None) -> None:
        """Puts rows that are encoded already, and known to be finite, at their places.

        Args:
            first_prompt: index within the window of the first of these prompts.
            codes: (n * positions, d_in), of the encoding's stored dtype: n consecutive prompts of the window.
            scale: float32 (n * positions, 2), for uint8.

        Raises:
            InputError: prompts outside the window, or added before.
        """
        taken = self._taken(first_prompt, len(codes) // self.layout.positions)
        places = self._places[taken].reshape(-1)
        self._images["activations"].put(places, codes)
        if scale is not None:
            self._images["scale"].put(places, scale)
        self._present[taken] = True

    def fill(self, first_prompt: int, rows: Floats) -> RunningSums | None:
        """As :meth:`add` for float16, in one pass that also sums the rows.

        Args:
            first_prompt: index within the window of the first of these prompts.
            rows: float32 (n, positions, d_in), the rows of each prompt contiguous.

        Returns:
            The rows' sums; None, and nothing was added, where a half cannot hold a value: :meth:`add` then names it.

        Raises:
            InputError: prompts outside the window, or added before.
        """
        taken, sums = self._taken(first_prompt, len(rows)), RunningSums.empty(self.layout.d_in)
        for places, prompt in zip(self._places[taken], rows, strict=True):
            self._images["activations"].encode_float16(places, prompt, sums)
        if not sums.within(float(np.finfo(np.float16).max)):
            return None
        self._present[taken] = True
        return sums

    def give_up(self, layout: Layout) -> dict[str, ShardImages]:
        """Hands the memory of the rows to a buffer of ``layout``; this one can no longer be used."""
        if layout != self.layout:
            raise ConfigError("memory of a buffer of another layout", found=self.layout, expected=layout)
        images, self._images = self._images, {}
        return images

    def write(self, folder: Path, *, group: str = GROUP_NAME, threads: int = 2) -> dict[str, FileRecord]:
        """Writes the window's files, not yet durable, and hashes their bytes on the way.

        Args:
            folder: the artifact's (staging) folder.
            group: folder of the Zarr group within it.
            threads: that write at once.

        Returns:
            Size and sha256 of each file by its name relative to ``folder``.
        """
        if not self._present.all():
            missing = int(np.flatnonzero(~self._present)[0])
            raise InputError("the window is not complete", where=f"window {self.window}", found=f"no prompt {missing}")
        checksums: list[npt.NDArray[np.uint32]] = []
        records: dict[str, FileRecord] = {}
        with ThreadPoolExecutor(threads) as pool:
            for name, images in self._images.items():
                if name == "checksum":  # the last one
                    images.put(np.arange(images.n_rows), np.stack(checksums, axis=1))
                write = partial(self._write_shard, folder, group, self._arrays[name], images)
                written = list(pool.map(write, range(images.n_shards)))
                records |= {file: record for file, record, _ in written}
                checksums.append(np.concatenate([found for _, _, found in written]))
        return records

    def _taken(self, first_prompt: int, n_prompts: int) -> slice:
        taken = slice(first_prompt, first_prompt + n_prompts)
        if first_prompt < 0 or taken.stop > self.layout.window_prompts or self._present[taken].any():
            raise InputError("prompts outside the window, or added twice", found=f"{first_prompt} and {n_prompts} on")
        return taken

    def _encode(self, first_prompt: int, rows: Floats) -> tuple[npt.NDArray[np.generic], Floats | None]:
        layout = self.layout
        try:
            codes, scale = encode(rows.reshape(-1, layout.d_in), layout.encoding)
        except NumericsError as error:
            row = error.row or 0
            prompt = self.prompts[first_prompt + row // layout.positions]
            position = layout.first_position + row % layout.positions
            raise NumericsError(
                error.what,
                row=row,
                where=f"prompt {prompt}, position {position}",
                found=error.found,
                remedy="choose another encoding, or look at what the model computes there",
            ) from error
        return cast("npt.NDArray[np.generic]", codes), scale

    def _write_shard(
        self, folder: Path, group: str, array: ShardedArray, images: ShardImages, number: int
    ) -> tuple[str, FileRecord, npt.NDArray[np.uint32]]:
        name = f"{group}/{array.shard_name(self.window * images.n_shards + number)}"
        atomic.make_folder((folder / name).parent, durable=False)
        checksums = images.seal(number)
        return name, images.write(folder / name, number), checksums


def _new_images(layout: Layout) -> dict[str, ShardImages]:
    return {name: ShardImages(array, array.n_shards // layout.n_windows) for name, array in layout.arrays().items()}


def window_files(layout: Layout, window: int, *, group: str = GROUP_NAME) -> list[str]:
    """Names of the files that :meth:`WindowBuffer.write` writes for a window, relative to the artifact's folder."""
    return [
        f"{group}/{array.shard_name(shard)}"
        for array in layout.arrays().values()
        for shard in _shards_of(array, layout, window)
    ]


def window_of(layout: Layout, name: str, *, group: str = GROUP_NAME) -> int | None:
    """The window that a file of a store belongs to, or None for its metadata and for what is no file of it."""
    for array in layout.arrays().values():
        prefix, suffix = f"{group}/{array.name}/c/", array.shard_name(0).removeprefix(f"{array.name}/c/0")
        shard = name.removeprefix(prefix).removesuffix(suffix)
        if shard.isdecimal() and name == f"{group}/{array.shard_name(int(shard))}" and int(shard) < array.n_shards:
            return int(shard) * layout.n_windows // array.n_shards
    return None


def _shards_of(array: ShardedArray, layout: Layout, window: int) -> range:
    per_window = array.n_shards // layout.n_windows
    return range(window * per_window, (window + 1) * per_window)
