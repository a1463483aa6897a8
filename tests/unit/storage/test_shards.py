import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import zarr

from storage.encoding import ENCODINGS, Encoding, encode
from storage.errors import ConfigError, InputError, NumericsError
from storage.shards import GROUP_NAME, Layout, WindowBuffer, create_group, window_files, window_of
from storage.shuffle import prompt_order
from tests.unit.storage.stores import SMALL, activations, encoded_as, write_store


def read_with_zarr(folder: Path, name: str) -> npt.NDArray[np.generic]:
    group = zarr.open_group(folder / GROUP_NAME, mode="r")
    return np.asarray(group[name][:])  # pyright: ignore[reportIndexIssue]


def read_with_tensorstore(folder: Path, name: str) -> npt.NDArray[np.generic]:
    store = {"driver": "file", "path": str(folder / GROUP_NAME / name)}
    return np.asarray(tensorstore.open({"driver": "zarr3", "kvstore": store}).result().read().result())


def bytes_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zarr_and_tensorstore_read_the_codes_of_every_token(tmp_path: Path, encoding: Encoding):
    layout = encoded_as(encoding)
    write_store(tmp_path, layout)
    values = activations(layout)
    for read in (read_with_zarr, read_with_tensorstore):
        prompt, position = read(tmp_path, "prompt"), read(tmp_path, "position")
        codes, scale = encode(values[prompt, position], encoding)
        np.testing.assert_array_equal(read(tmp_path, "activations"), codes)
        if scale is not None:
            np.testing.assert_array_equal(read(tmp_path, "scale"), scale)


def test_every_token_of_the_windows_prompts_is_there_once(tmp_path: Path):
    write_store(tmp_path)
    tokens = list(zip(read_with_zarr(tmp_path, "prompt"), read_with_zarr(tmp_path, "position"), strict=True))
    harvested = prompt_order(SMALL.seed, SMALL.n_prompts)[: 3 * 32]
    assert sorted(tokens) == sorted((prompt, position) for prompt in harvested for position in range(1, 6))


def test_no_shard_holds_two_rows_of_a_prompt(tmp_path: Path):
    write_store(tmp_path)
    shards = read_with_zarr(tmp_path, "prompt").reshape(SMALL.n_shards, SMALL.window_prompts)
    assert all(len(set(shard.tolist())) == SMALL.window_prompts for shard in shards)


def test_windows_hold_their_part_of_the_prompt_order(tmp_path: Path):
    write_store(tmp_path)
    windows = read_with_zarr(tmp_path, "prompt").reshape(3, -1)
    order = prompt_order(SMALL.seed, SMALL.n_prompts)
    for window in range(3):
        assert set(windows[window].tolist()) == set(order[window * 32 : (window + 1) * 32].tolist())


def test_files_are_one_a_shard_and_one_a_window_with_default_chunk_keys(tmp_path: Path):
    names = write_store(tmp_path)
    assert sorted(names) == sorted(bytes_under(tmp_path))
    expected = {f"{GROUP_NAME}/zarr.json"}
    for array in ("activations", "prompt", "position", "checksum"):
        expected.add(f"{GROUP_NAME}/{array}/zarr.json")
    expected |= {f"{GROUP_NAME}/activations/c/{shard}/0" for shard in range(15)}
    expected |= {f"{GROUP_NAME}/{array}/c/{window}" for array in ("prompt", "position") for window in range(3)}
    expected |= {f"{GROUP_NAME}/checksum/c/{window}/0" for window in range(3)}
    assert set(names) == expected


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_layout_knows_the_size_of_its_files(tmp_path: Path, encoding: Encoding):
    layout = encoded_as(encoding)
    write_store(tmp_path, layout)
    assert layout.bytes == sum(len(v) for k, v in bytes_under(tmp_path).items() if not k.endswith("zarr.json"))


@pytest.mark.parametrize(("encoding", "overhead"), [("float16", 0.01), ("uint8", 0.02)])
def test_bytes_a_row_at_full_width_stay_within_the_promise(encoding: Encoding, overhead: float):
    layout = Layout(10, 8192, 127, 2048, 256, encoding, 0, 100_000)
    width = {"float16": 2, "uint8": 1}[encoding] * 2048
    assert width < layout.bytes / layout.n_rows < width * (1 + overhead)


def test_chunks_carry_a_checksum_that_zarr_checks(tmp_path: Path):
    write_store(tmp_path)
    path = tmp_path / GROUP_NAME / "activations/c/3/0"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        read_with_zarr(tmp_path, "activations")
    with pytest.raises(ValueError, match=r"checksum|CRC"):
        read_with_tensorstore(tmp_path, "activations")


def test_chunks_of_zeros_are_written(tmp_path: Path):
    layout = replace(SMALL, n_windows=1)
    create_group(tmp_path, layout)
    buffer = WindowBuffer(layout, 0)
    buffer.add(0, np.zeros((32, 5, 6), np.float32))
    buffer.write(tmp_path)
    array = layout.arrays()["activations"]
    assert (tmp_path / GROUP_NAME / "activations/c/0/0").stat().st_size == array.shard_bytes > 32 * 6 * 4


def test_a_windows_bytes_depend_on_nothing_but_the_series_and_its_number(tmp_path: Path):
    write_store(tmp_path / "all")
    longer = replace(SMALL, n_windows=2)
    for window in (1, 0):
        write_store(tmp_path / "one", longer, [window])
    whole, part = bytes_under(tmp_path / "all"), bytes_under(tmp_path / "one")
    shards = [name for name in part if not name.endswith("zarr.json")]
    assert len(shards) == 2 * (5 + 3)
    assert all(part[name] == whole[name] for name in shards)


def test_batch_composition_and_order_of_adding_do_not_matter(tmp_path: Path):
    values = activations(SMALL)[:, 1:]
    for folder, cuts in (("a", [0, 32]), ("b", [20, 32, 0, 7, 20])):
        buffer = WindowBuffer(SMALL, 1)
        for first, end in pairwise(cuts):
            if first < end:
                buffer.add(first, values[buffer.prompts[first:end]])
        buffer.write(tmp_path / folder, threads=1 if folder == "a" else 4)
    assert bytes_under(tmp_path / "a") == bytes_under(tmp_path / "b")


def test_the_first_position_is_a_choice(tmp_path: Path):
    write_store(tmp_path, replace(SMALL, first_position=0))
    assert sorted(set(read_with_zarr(tmp_path, "position").tolist())) == [0, 1, 2, 3, 4]


def test_prompts_may_be_given():
    own = np.arange(32) + 500
    np.testing.assert_array_equal(WindowBuffer(SMALL, 0, own).prompts, own)
    with pytest.raises(ConfigError):
        WindowBuffer(SMALL, 0, own[:-1])


def test_an_unfinished_window_is_not_written(tmp_path: Path):
    buffer = WindowBuffer(SMALL, 0)
    buffer.add(0, np.zeros((31, 5, 6), np.float32))
    with pytest.raises(InputError, match="prompt 31"):
        buffer.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("first", "shape"), [(0, (4, 5, 6)), (31, (2, 5, 6)), (-1, (1, 5, 6)), (8, (1, 4, 6)), (8, (1, 5, 7))]
)
def test_rows_that_do_not_belong_are_refused(first: int, shape: tuple[int, ...]):
    buffer = WindowBuffer(SMALL, 0)
    buffer.add(3, np.zeros((1, 5, 6), np.float32))
    with pytest.raises(InputError):
        buffer.add(first, np.zeros(shape, np.float32))


def test_a_value_that_does_not_fit_names_its_prompt_and_position():
    buffer = WindowBuffer(encoded_as("float16"), 1)
    rows = np.zeros((8, 5, 6), np.float32)
    rows[3, 2, 4] = 1e6
    with pytest.raises(NumericsError, match=f"prompt {buffer.prompts[16 + 3]}, position 3"):
        buffer.add(16, rows)


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_rows": 5},
        {"n_windows": 4},
        {"n_windows": 0},
        {"d_in": 0},
        {"first_position": -1},
        {"positions": 2**16},
        {"encoding": "int4"},
        {"n_prompts": 2**31},
    ],
)
def test_impossible_layouts_are_refused(change: dict[str, int]):
    with pytest.raises(ConfigError):
        replace(SMALL, **change)


def test_the_group_tells_its_layout_and_how_to_decode(tmp_path: Path):
    layout = encoded_as("bfloat16")
    write_store(tmp_path, layout)
    group = zarr.open_group(tmp_path / GROUP_NAME, mode="r")
    told = json.loads(json.dumps(group.attrs["sparsemill"]))
    assert told["format_version"] == 0
    assert Layout.from_json(told["layout"]) == layout
    names: dict[str, object] = {"stored": group["activations"][:]}  # pyright: ignore[reportIndexIssue]
    exec(str(group["activations"].attrs["decode"]), {}, names)
    prompt, position = read_with_zarr(tmp_path, "prompt"), read_with_zarr(tmp_path, "position")
    np.testing.assert_allclose(names["x"], activations(layout)[prompt, position], rtol=2**-8)


def test_no_such_window():
    with pytest.raises(ConfigError):
        WindowBuffer(SMALL, 3)


def test_a_buffer_in_the_memory_of_another_writes_the_same_bytes(tmp_path: Path):
    values = activations(SMALL)[:, 1:]
    files: list[dict[str, bytes]] = []
    used = WindowBuffer(SMALL, 0)
    used.add(0, values[used.prompts])
    for name, reuse in (("fresh", None), ("reused", used)):
        buffer = WindowBuffer(SMALL, 1, reuse=reuse)
        buffer.add(0, values[buffer.prompts])
        files.append({file: (tmp_path / name / file).read_bytes() for file in buffer.write(tmp_path / name)})
    assert files[0] == files[1]
    with pytest.raises(ConfigError, match="another layout"):
        WindowBuffer(encoded_as("float16"), 0, reuse=buffer)


@pytest.mark.parametrize("encoding", ["float32", "uint8"])
def test_every_file_of_a_store_is_known_to_its_window(tmp_path: Path, encoding: str):
    layout = encoded_as(encoding)
    create_group(tmp_path, layout)
    for window in range(layout.n_windows):
        buffer = WindowBuffer(layout, window)
        buffer.add(0, activations(layout)[buffer.prompts][:, 1:])
        written = buffer.write(tmp_path)
        assert sorted(written) == sorted(window_files(layout, window))
        for name, record in written.items():
            assert window_of(layout, name) == window
            data = (tmp_path / name).read_bytes()
            assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for name in (f"{GROUP_NAME}/zarr.json", f"{GROUP_NAME}/prompt/zarr.json", f"{GROUP_NAME}/prompt/c/3", "other"):
        assert window_of(layout, name) is None


def test_more_files_than_an_artifact_may_have_are_refused_before_any_is_written(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"1,000,350, in 76,950 windows; .*at most 1,000,000; choose larger windows"):
        create_group(tmp_path, replace(SMALL, n_windows=76_950, n_prompts=2**30))
    create_group(tmp_path, replace(SMALL, n_windows=76_900, n_prompts=2**30))
