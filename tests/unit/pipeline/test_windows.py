"""The fast path into a window's buffer against the plain one, byte for byte."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.windows import single_threaded, take_in
from storage.errors import NumericsError
from storage.shards import Layout, WindowBuffer
from tests.unit.storage.stores import SMALL, activations

ENCODINGS = ["float32", "float16", "bfloat16", "uint8"]


def layout_of(encoding: str) -> Layout:
    return replace(SMALL, encoding=encoding)  # pyright: ignore[reportArgumentType]


def written(buffer: WindowBuffer, folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in buffer.write(folder)}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1.2e4])  # with float16: common values, subnormal ones, large ones
def test_the_fast_path_writes_the_bytes_of_the_plain_one(tmp_path: Path, encoding: str, scale: float):
    layout = layout_of(encoding)
    fast, plain = WindowBuffer(layout, 1), WindowBuffer(layout, 1)
    rows = activations(layout)[fast.prompts][:, 1:] * np.float32(scale)
    for first in range(0, layout.window_prompts, 8):
        take_in(fast, first, torch.from_numpy(rows[first : first + 8]), outer=False)
        plain.add(first, rows[first : first + 8])
    assert written(fast, tmp_path / "fast") == written(plain, tmp_path / "plain")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_sums_are_those_of_the_rows(encoding: str):
    buffer = WindowBuffer(layout_of(encoding), 0)
    rows = torch.from_numpy(activations(SMALL)[:8, 1:])
    sums = take_in(buffer, 0, rows, outer=True)
    expected = rows.double().flatten(0, 1).numpy()
    assert sums.rows == 40
    np.testing.assert_allclose(sums.total, expected.sum(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(sums.low, expected.min(0).astype(np.float32))
    np.testing.assert_array_equal(sums.high, expected.max(0).astype(np.float32))
    assert sums.outer is not None
    np.testing.assert_allclose(sums.outer, expected.T @ expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named_by_prompt_and_position(encoding: str, value: float):
    buffer = WindowBuffer(layout_of(encoding), 0)
    rows = torch.from_numpy(activations(SMALL)[:8, 1:])
    rows[5, 2, 3] = value
    with pytest.raises(NumericsError, match=f"prompt {buffer.prompts[5]}, position 3"):
        take_in(buffer, 0, rows, outer=False)


def test_what_a_half_can_just_hold_is_kept_and_what_it_cannot_stops():
    buffer = WindowBuffer(layout_of("float16"), 0)
    rows = torch.from_numpy(activations(SMALL)[:16, 1:])
    rows[0, 0, 0] = 65519.0  # rounds to 65504, the largest half
    take_in(buffer, 0, rows[:8], outer=False)
    rows[9, 0, 0] = 65520.0  # rounds to infinity
    with pytest.raises(NumericsError, match=f"prompt {buffer.prompts[9]}, position 1"):
        take_in(buffer, 8, rows[8:], outer=False)


def test_the_thread_count_is_set_back_also_after_an_error():
    before, within = torch.get_num_threads(), 0

    def fail() -> None:
        nonlocal within
        with single_threaded():
            within = torch.get_num_threads()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (within, torch.get_num_threads()) == (1, before)
