"""Activation rows -> what is stored, and back: float32, float16, bfloat16 (its bits in uint16), uint8 companded.

float16 rounds to nearest even; so does bfloat16, by integer arithmetic on the float32's bits.

uint8 keeps the signed square root of a value in equal steps, so that small values, of which GELU makes many, keep their
relative precision. A row of least value -m and greatest M (either may be 0) has the zero code
z = 255 sqrt(m) / (sqrt(m) + sqrt(M)), rounded to an integer so that 0 stays 0, and the step
h = max(sqrt(m) / z, sqrt(M) / (255 - z)). Its codes are k = z + round(sign(x) sqrt(|x|) / h), decoded as
y |y| with y = h (k - z). As y is off by at most h / 2, the error of x is at most h sqrt(|x|) + h^2 / 4. The pair (h, z)
is the row's *scale*, 8 bytes. Rejected: one code range symmetric about 0 (it spends half the codes on GELU's negative
side, which ends at -0.17), and a linear code (its steps are as wide at 0, where most values are, as at the top).

Values that do not fit stop with their row named: never stored as infinities.
"""

from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from storage.errors import ConfigError, NumericsError

Encoding = Literal["float32", "float16", "bfloat16", "uint8"]
"""How activations are kept on disk."""

Floats: TypeAlias = npt.NDArray[np.float32]
Codes: TypeAlias = "npt.NDArray[np.float32 | np.float16 | np.uint16 | np.uint8]"

ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)

_DTYPES: dict[Encoding, np.dtype[np.float32 | np.float16 | np.uint16 | np.uint8]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
}

_UINT8_LIMIT = np.float32(3.4e38)  # what decodes to a finite float32 whatever the rounding of its scale

_WORTH_COMPILED_CODE = 1 << 20  # values, from which on decoding takes longer than loading compiled code

DECODING: dict[Encoding, str] = {
    "float32": "x = stored",
    "float16": "x = stored.astype('float32')",
    "bfloat16": "x = (stored.astype('uint32') << 16).view('float32')",
    "uint8": "step, zero = scale[:, :1], scale[:, 1:]; y = (stored.astype('float32') - zero) * step; x = y * abs(y)",
}
"""For the attributes of a store: how to decode it with numpy alone."""


class Encoded(NamedTuple):
    """Encoded rows.

    Attributes:
        codes: (n, d), of the encoding's stored dtype.
        scale: float32 (n, 2), step and zero code of each row, for uint8; None otherwise.
    """

    codes: Codes
    scale: Floats | None


def stored_dtype(encoding: Encoding) -> np.dtype[np.float32 | np.float16 | np.uint16 | np.uint8]:
    """The little-endian numpy dtype of the codes."""
    if encoding not in _DTYPES:
        raise ConfigError("unknown encoding", found=repr(encoding), expected=" | ".join(ENCODINGS))
    return _DTYPES[encoding]


def row_bytes(encoding: Encoding, d_in: int) -> int:
    """Bytes that a row's codes and scale take."""
    return stored_dtype(encoding).itemsize * d_in + (8 if encoding == "uint8" else 0)


def encode(rows: Floats, encoding: Encoding) -> Encoded:
    """Encodes activations.

    Args:
        rows: float32 (n, d); of another float dtype they are converted first.
        encoding: how to keep them.

    Raises:
        NumericsError: a value is not finite, or too large for the encoding; ``.row`` is the first such row.
    """
    dtype = stored_dtype(encoding)
    rows = np.ascontiguousarray(rows, np.float32)
    if encoding == "float32":
        _check_finite(rows, rows, encoding)
        return Encoded(rows.astype(dtype, copy=False), None)
    if encoding == "float16":
        with np.errstate(over="ignore", under="ignore"):
            halves = rows.astype(dtype)
        # The largest pattern of exponent and mantissa tells, six times faster than numpy.isfinite does for halves.
        if halves.size and (halves.view(np.uint16) & np.uint16(0x7FFF)).max() >= 0x7C00:
            _check_finite(halves, rows, encoding)
        return Encoded(halves, None)
    if encoding == "bfloat16":
        return Encoded(_bfloat16_bits(rows), None)
    _check_finite(np.where(np.abs(rows) <= _UINT8_LIMIT, rows, np.inf), rows, encoding)
    return _compand(rows)


def decode(codes: Codes, encoding: Encoding, scale: Floats | None = None, out: Floats | None = None) -> Floats:
    """Decodes to float32.

    Args:
        codes: (n, d), as :func:`encode` returns them.
        encoding: how they were encoded.
        scale: float32 (n, 2), for uint8.
        out: float32 (n, d), C-contiguous, to write to; a new array if None.

    Returns:
        float32 (n, d), never memory of ``codes``.
    """
    if encoding == "uint8" and scale is None:
        raise ConfigError("uint8 codes cannot be decoded without their scale")
    if out is None:
        out = np.empty(codes.shape, np.float32)
    if out.shape != codes.shape or not out.flags.c_contiguous:
        raise ConfigError("no contiguous room for the decoded rows", found=out.shape, expected=codes.shape)
    if encoding == "float32" or codes.size < _WORTH_COMPILED_CODE:
        _decode_by_numpy(codes, encoding, scale, out)
    else:
        _decode_by_compiled_code(np.ascontiguousarray(codes), encoding, scale, out)
    return out


def _decode_by_numpy(codes: Codes, encoding: Encoding, scale: Floats | None, out: Floats) -> None:
    if encoding == "bfloat16":
        bits = out.view(np.uint32)
        np.copyto(bits, codes)
        bits <<= np.uint32(16)
        return
    np.copyto(out, codes)
    if scale is not None:
        out -= scale[:, 1:]
        out *= scale[:, :1]
        out *= np.abs(out)


def _decode_by_compiled_code(codes: Codes, encoding: Encoding, scale: Floats | None, out: Floats) -> None:
    from storage import compiled  # here, as numba takes half a second and verifying or sharing has no use for it

    if encoding == "uint8":
        compiled.decode_uint8(codes, np.ascontiguousarray(scale), out)
        return
    run = compiled.decode_float16 if encoding == "float16" else compiled.decode_bfloat16
    run(codes.reshape(-1).view(np.uint16), out.reshape(-1))


def _bfloat16_bits(rows: Floats) -> npt.NDArray[np.uint16]:
    bits = rows.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    halves = rounded.astype("<u2")
    if not np.isfinite(rows).all() or ((halves & np.uint16(0x7FFF)) >= np.uint16(0x7F80)).any():
        decoded = decode(halves, "bfloat16")
        decoded[~np.isfinite(rows)] = np.nan  # adding to the bits of a NaN may have made them those of a number
        _check_finite(decoded, rows, "bfloat16")
    return halves


def _compand(rows: Floats) -> Encoded:
    n = len(rows)
    low = np.sqrt(np.maximum(-rows.min(axis=1, initial=0), 0))
    high = np.sqrt(np.maximum(rows.max(axis=1, initial=0), 0))
    span = low + high
    zero = np.rint(np.divide(255 * low, span, out=np.zeros(n, np.float32), where=span > 0))
    below = np.divide(low, zero, out=np.zeros(n, np.float32), where=zero > 0)
    above = np.divide(high, 255 - zero, out=np.zeros(n, np.float32), where=zero < 255)
    step = np.maximum(below, above)
    inverse = np.divide(np.float32(1), step, out=np.zeros(n, np.float32), where=step > 0)
    codes = np.sqrt(np.abs(rows))
    codes *= inverse[:, None]
    np.copysign(codes, rows, out=codes)
    np.rint(codes, out=codes)
    codes += zero[:, None]
    np.clip(codes, 0, 255, out=codes)
    return Encoded(codes.astype(np.uint8), np.stack([step, zero], axis=1).astype("<f4"))


def _check_finite(encoded: Codes, rows: Floats, encoding: Encoding) -> None:
    good = np.isfinite(encoded)
    if good.all():
        return
    row, column = (int(i) for i in np.argwhere(~good)[0])
    value = rows[row, column]
    what = f"a value too large for {encoding}" if np.isfinite(value) else "a value that is not finite"
    raise NumericsError(what, row=row, where=f"row {row}, column {column}", found=value)
