import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from storage.encoding import DECODING, ENCODINGS, Encoding, decode, encode, row_bytes, stored_dtype
from storage.errors import ConfigError, NumericsError

Floats = npt.NDArray[np.float32]


def gelu_rows(n: int = 200, d: int = 64) -> Floats:
    """Rows like GELU activations: most of them small, the negative ones above -0.17."""
    x = np.random.default_rng(3).standard_normal((n, d)) * 1.5
    return (x / (1 + np.exp(-1.702 * x))).astype(np.float32)


def test_float32_is_kept_exactly():
    rows = gelu_rows()
    codes, scale = encode(rows, "float32")
    assert scale is None
    np.testing.assert_array_equal(decode(codes, "float32"), rows)


def test_float16_rounds_to_nearest():
    rows = gelu_rows()
    codes, _ = encode(rows, "float16")
    np.testing.assert_array_equal(codes, rows.astype(np.float16))
    assert (np.abs(decode(codes, "float16") - rows) <= np.abs(rows) * 2**-11 + 2**-25).all()


def test_bfloat16_is_what_ml_dtypes_makes_of_every_exponent_and_every_tie():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    ties = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    values = np.concatenate([bits, ties]).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        reference = values.astype(ml_dtypes.bfloat16)
        fits = np.isfinite(reference.astype(np.float32))
    rows = values[fits][None]
    codes, _ = encode(rows, "bfloat16")
    np.testing.assert_array_equal(codes[0], reference[fits].view(np.uint16))
    np.testing.assert_array_equal(decode(codes, "bfloat16")[0], reference[fits].astype(np.float32))


def test_uint8_error_is_within_its_bound_at_every_value():
    rows = np.concatenate([gelu_rows(), np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32) * 100])
    codes, scale = encode(rows, "uint8")
    assert scale is not None
    step = scale[:, :1].astype(np.float64)
    bound = step * np.sqrt(np.abs(rows, dtype=np.float64)) + step**2 / 4
    error = np.abs(decode(codes, "uint8", scale).astype(np.float64) - rows)
    assert (error <= bound * (1 + 1e-5)).all()


def test_uint8_explains_nearly_all_variance_of_gelu_activations():
    rows = gelu_rows()
    codes, scale = encode(rows, "uint8")
    error = decode(codes, "uint8", scale).astype(np.float64) - rows
    assert (error**2).sum() / ((rows - rows.mean(0, dtype=np.float64)) ** 2).sum() < 5e-5


@pytest.mark.parametrize(
    "row",
    [
        [0, 0, 0, 0],
        [1, 2, 3, 4],
        [-1, -2, -3, -4],
        [0, 5, 0, 0],
        [0, -5, 0, 0],
        [-1e-6, 100, 0, 1],
        [100, -100, 0, 1e-6],
        [-100, 1e-6, 0, 0],
        [1e-30, -1e-30, 1e-38, 0],
        [3e38, -3e38, 1, 0],
    ],
)
def test_uint8_keeps_zeros_signs_and_extremes(row: list[float]):
    rows = np.array([row], np.float32)
    codes, scale = encode(rows, "uint8")
    decoded = decode(codes, "uint8", scale)
    assert (decoded[rows == 0] == 0).all()
    assert (np.sign(decoded) * np.sign(rows) >= 0).all()
    largest = np.abs(rows).argmax()
    np.testing.assert_allclose(decoded[0, largest], rows[0, largest], rtol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_stops_with_its_row(encoding: Encoding, value: float):
    rows = gelu_rows()
    rows[17, 5] = value
    rows[31, 0] = value
    with pytest.raises(NumericsError, match="not finite") as caught:
        encode(rows, encoding)
    assert caught.value.row == 17
    assert "row 17, column 5" in str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "fits", "too_large"),
    [
        ("float16", 65519.996, 65520.0),
        ("float16", -65504.0, -1e6),
        ("bfloat16", 3.3895e38, 3.40e38),
        ("uint8", 3.39e38, 3.402e38),
    ],
)
def test_overflow_stops_with_its_row(encoding: Encoding, fits: float, too_large: float):
    rows = gelu_rows()
    rows[9, 2] = fits
    encode(rows, encoding)
    rows[9, 2] = too_large
    with pytest.raises(NumericsError, match=f"too large for {encoding}") as caught:
        encode(rows, encoding)
    assert caught.value.row == 9


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_recipe_in_the_attributes_decodes(encoding: Encoding):
    rows = gelu_rows()
    codes, scale = encode(rows, encoding)
    names: dict[str, object] = {"stored": codes, "scale": scale}
    exec(DECODING[encoding], {}, names)
    np.testing.assert_array_equal(names["x"], decode(codes, encoding, scale))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_codes_have_the_stored_dtype_and_decoding_makes_a_new_array(encoding: Encoding):
    codes, scale = encode(gelu_rows(), encoding)
    assert codes.dtype == stored_dtype(encoding)
    decoded = decode(codes, encoding, scale)
    assert decoded.dtype == np.float32
    assert not np.shares_memory(decoded, codes)


def every_code(encoding: Encoding) -> tuple[npt.NDArray[np.generic], Floats | None]:
    """Enough rows for compiled code, with every bit pattern among them, and scales of all magnitudes for uint8."""
    if encoding != "uint8":
        values = np.tile(np.arange(2**16, dtype=np.uint16), 20).reshape(-1, 512)
        return (values if encoding == "bfloat16" else values.view(np.float16)), None
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 256, (2560, 512), dtype=np.uint8)
    return codes, np.stack([10 ** rng.uniform(-30, 15, 2560), rng.integers(0, 256, 2560)], axis=1).astype(np.float32)


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "uint8"])
def test_large_blocks_decode_to_the_same_bits_as_the_recipe(encoding: Encoding):
    codes, scale = every_code(encoding)
    names: dict[str, object] = {"stored": codes, "scale": scale}
    with np.errstate(over="ignore"):
        exec(DECODING[encoding], {}, names)
    decoded = decode(codes, encoding, scale)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(decoded.view(np.uint32), np.asarray(names["x"], np.float32).view(np.uint32))
    out = np.full((len(codes) * 2, 512), np.nan, np.float32)[::2]  # not contiguous is the caller's mistake
    with pytest.raises(ConfigError, match="contiguous"):
        decode(codes, encoding, scale, out)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("rows", [3, 2048])
def test_decoding_writes_where_it_is_told(encoding: Encoding, rows: int):
    codes, scale = encode(gelu_rows(rows, 512), encoding)
    out = np.full((rows, 512), np.nan, np.float32)
    assert decode(codes, encoding, scale, out) is out
    np.testing.assert_array_equal(out, decode(codes, encoding, scale))
    np.testing.assert_array_equal(out[1:2], decode(codes[1:2], encoding, None if scale is None else scale[1:2]))


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "uint8"])
def test_large_blocks_that_are_not_contiguous_decode_too(encoding: Encoding):
    codes, scale = encode(gelu_rows(4096, 512), encoding)
    expected = decode(codes, encoding, scale)[::2]
    np.testing.assert_array_equal(decode(codes[::2], encoding, None if scale is None else scale[::2]), expected)


def test_row_bytes_are_those_of_codes_and_scale():
    assert [row_bytes(encoding, 100) for encoding in ENCODINGS] == [400, 200, 200, 108]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_rows_are_no_problem(encoding: Encoding):
    codes, scale = encode(np.empty((0, 4), np.float32), encoding)
    assert decode(codes, encoding, scale).shape == (0, 4)


def test_an_unknown_encoding_is_refused():
    with pytest.raises(ConfigError, match="float16"):
        stored_dtype("int4")  # pyright: ignore[reportArgumentType]


def test_uint8_needs_its_scale():
    with pytest.raises(ConfigError):
        decode(np.zeros((1, 2), np.uint8), "uint8")
