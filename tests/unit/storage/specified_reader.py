"""A second reader of activation stores, written from docs/storage-format.md alone: it shares no code with the first."""

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from math import comb, prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]
TYPES = {"float32": "<f4", "float16": "<f2", "uint16": "<u2", "uint8": "u1", "int32": "<i4", "uint32": "<u4"}


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def unseal(data: bytes) -> dict[str, Any]:
    body = json.loads(data)
    checksum = body.pop("checksum")
    assert checksum == hashlib.sha256(canonical(body)).hexdigest()
    assert data == canonical(body | {"checksum": checksum})
    return body


def check_artifact(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact, its id and every file compared with it."""
    manifest = unseal((folder / "manifest.json").read_bytes())
    assert manifest["format_version"] == 0
    spec = manifest["spec"]
    assert manifest["id"] == folder.name == f"{spec['stage']}-{hashlib.sha256(canonical(spec)).hexdigest()[:12]}"
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert there.keys() - {"manifest.json", "run.json"} == manifest["files"].keys()
    for name, record in manifest["files"].items():
        data = there[name].read_bytes()
        assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return manifest


def check_places(group: Path) -> None:
    """Compares the checksum of each chunk with the one of its place."""
    table = read_array(group / "checksum")
    names = json.loads((group / "checksum" / "zarr.json").read_text())["attributes"]["columns"]
    for name, column in zip(names, table.T, strict=True):
        chunks = np.split(read_array(group / name), len(table))
        assert [google_crc32c.value(chunk.tobytes()) for chunk in chunks] == column.tolist()


def read_array(folder: Path) -> Array:
    """A whole array, every checksum of its shards compared."""
    metadata = json.loads((folder / "zarr.json").read_text())
    shape, dtype = metadata["shape"], np.dtype(TYPES[metadata["data_type"]])
    shard_rows = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
    chunk_rows = metadata["codecs"][0]["configuration"]["chunk_shape"][0]
    size, count = chunk_rows * prod(shape[1:]) * dtype.itemsize, shard_rows // chunk_rows
    index = b"".join((i * (size + 4)).to_bytes(8, "little") + (size + 4).to_bytes(8, "little") for i in range(count))
    assert {path.name for path in (folder / "c").iterdir()} == {str(i) for i in range(shape[0] // shard_rows)}
    rows = []
    for shard in range(shape[0] // shard_rows):
        data = (folder / "c" / str(shard) / ("0" if shape[1:] else "")).read_bytes()
        assert data[count * (size + 4) :] == index + google_crc32c.value(index).to_bytes(4, "little")
        for start in range(0, count * (size + 4), size + 4):
            chunk = data[start : start + size]
            assert data[start + size : start + size + 4] == google_crc32c.value(chunk).to_bytes(4, "little")
            rows.append(np.frombuffer(chunk, dtype).reshape(chunk_rows, *shape[1:]))
    return np.concatenate(rows)


def decode(group: Path, stored: Array) -> Array:
    encoding = json.loads((group / "activations" / "zarr.json").read_text())["attributes"]["encoding"]
    if encoding == "bfloat16":
        return (stored.astype("<u4") << 16).view("<f4")
    if encoding == "uint8":
        step, zero = read_array(group / "scale").T[..., None]
        y = step * (stored.astype("<f4") - zero)
        return y * np.abs(y)
    return stored.astype("<f4")


def permutations(count: int, n: int, *place: int | str) -> Array:
    key = np.frombuffer(hashlib.sha256(canonical(place)).digest()[:16], "<u8")
    numbers = np.random.Philox(key=key).random_raw(count * n).reshape(count, n)
    bits = np.uint64(max((n - 1).bit_length(), 1))
    return np.argsort((numbers >> bits << bits) | np.arange(n, dtype=np.uint64), axis=1)


def places(layout: dict[str, Any]) -> Iterator[tuple[int, int, int]]:
    """Prompt, position and row of every token in the store."""
    seed, P, L = layout["seed"], layout["window_prompts"], layout["positions"]
    (order,) = permutations(1, layout["n_prompts"], seed, "prompts")
    for window in range(layout["n_windows"]):
        column = permutations(P, L, seed, "positions", window)
        row = permutations(L, P, seed, "rows", window)
        for p in range(P):
            for t in range(L):
                q = int(column[p, t])
                prompt, position = int(order[window * P + p]), layout["first_position"] + t
                yield prompt, position, (window * L + q) * P + int(row[q, p])


def lane_order(n: int, u: int, seed: int, epoch: int, lane: int) -> Array:
    """The order in which a lane hands out its n rows."""
    starts = [0, *range(6 * u, n + 9 * u, 3 * u)]  # of segments, those beyond the end among them
    segment = [(min(start, n), min(end, n)) for start, end in pairwise(starts)]
    last = max(0, (n - 6 * u) // (3 * u))
    stages = []
    for t in range(last + 1):
        parts = []
        for i in range(max(0, t - 2), t + 1):
            start, end = segment[i]
            (shuffled,) = permutations(1, end - start, seed, "segment", epoch, lane, i)
            a = t - i
            place, size = (3 * a * u - a * (a - 1) * u // 2, (3 - a) * u) if i == 0 else (a * u, u)
            parts.append(start + shuffled[place : None if t == last else place + size])
        if t == last:
            parts.append(np.arange(segment[t][1], n))
        rows = np.concatenate(parts)
        stages.append(rows[permutations(1, len(rows), seed, "stage", epoch, lane, t)[0]])
    return np.concatenate(stages)


def batches(
    chunks: int, chunk_rows: int, epoch: int, *, seed: int, batch_rows: int, pool_rows: int, lanes: int
) -> Iterator[Array]:
    """The store's rows in each batch of an epoch."""
    (order,) = permutations(1, chunks, seed, "chunks", epoch)
    rows = order[:, None] * chunk_rows + np.arange(chunk_rows)
    whole = chunks // lanes
    rest = rows[whole * lanes :].ravel()
    handed_out = []
    for v in range(lanes):
        shared = rest[v * len(rest) // lanes : (v + 1) * len(rest) // lanes]
        own = np.concatenate([rows[: whole * lanes][v::lanes].ravel(), shared])
        handed_out.append(own[lane_order(len(own), -(-pool_rows // (6 * lanes)), seed, epoch, v)])
    count, share = -(-chunks * chunk_rows // batch_rows), batch_rows // lanes
    for k in range(count):
        end = None if k == count - 1 else (k + 1) * share
        yield np.concatenate([lane[k * share : end] for lane in handed_out])


def certificate(layout: dict[str, Any], prompt: Array, order: dict[str, int]) -> dict[str, float | bool]:
    """The certificate of a store whose rows have these prompt numbers, for an order of batches."""
    n, positions, full = len(prompt), layout["positions"], order["batch_rows"]
    pairs, expected, distinct = 0, 0.0, []
    for rows in batches(n // layout["chunk_rows"], layout["chunk_rows"], 0, **order):
        counts = np.bincount(prompt[rows])
        pairs += int((counts * (counts - 1) // 2).sum())
        expected += len(rows) * (len(rows) - 1) / 2 * (positions - 1) / (n - 1)
        distinct += [np.count_nonzero(counts)] if len(rows) == full else []
    ratio, error = pairs / expected, expected**-0.5
    return {
        "pair_ratio": ratio,
        "standard_error": error,
        "distinct_prompts": float(np.mean(distinct)),
        "distinct_prompts_uniform": n / positions * (1 - comb(n - positions, full) / comb(n, full)),
        "passed": abs(ratio - 1) <= 0.05 or (n < 8_000_000 and abs(ratio - 1) <= 4 * error),
    }


def training_prompts(tokens: Path) -> Array:
    """Token ids of the training prompts of a tokens artifact: (prompts, length)."""
    files = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in sorted(tokens.glob("train-*.arrow"))]
    return np.concatenate([np.array(file["tokens"].to_pylist(), np.int32) for file in files])
