"""Encodings and fingerprints over all values."""

import json

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from storage.encoding import ENCODINGS, Encoding, decode, encode
from storage.errors import NumericsError
from storage.fingerprint import Json, canonical_json, fingerprint, seal_json, unseal_json

QUICK = settings(max_examples=60, deadline=None)

rows = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.floats(width=32, allow_subnormal=True)
)
values: st.SearchStrategy[Json] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def error_bound(
    x: npt.NDArray[np.float64], encoding: Encoding, step: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The largest error that an encoding is documented to make of x."""
    match encoding:
        case "float32":
            return np.zeros_like(x)
        case "float16":
            return np.maximum(np.abs(x) * 2.0**-11, 2.0**-25)
        case "bfloat16":
            return np.maximum(np.abs(x) * 2.0**-8, 2.0**-134)
        case "uint8":
            # The scale and the decoding are float32: a few of its roundings on top.
            return (step * np.sqrt(np.abs(x)) + step**2 / 4) * (1 + 1e-5) + np.abs(x) * 1e-6 + 1e-44


@QUICK
@given(rows, st.sampled_from(ENCODINGS))
def test_a_round_trip_is_within_the_bound_or_refused(x: npt.NDArray[np.float32], encoding: Encoding):
    # Below these magnitudes a value rounds to a finite one (float16: 65504 + half a step; bfloat16 likewise).
    limit = {"float32": np.inf, "float16": 65520.0, "bfloat16": 3.3961775e38, "uint8": 3.4000001e38}[encoding]
    exact = x.astype(np.float64)
    bad_rows = np.flatnonzero(~(np.abs(exact) < limit).all(axis=1))
    if bad_rows.size:
        with pytest.raises(NumericsError) as caught:
            encode(x, encoding)
        assert caught.value.row == bad_rows[0]
        return
    codes, scale = encode(x, encoding)
    step = np.zeros((len(x), 1)) if scale is None else scale[:, :1].astype(np.float64)
    error = np.abs(decode(codes, encoding, scale).astype(np.float64) - exact)
    assert (error <= error_bound(exact, encoding, step)).all()


@QUICK
@given(values)
def test_canonical_json_reads_back_and_is_stable(value: Json):
    data = canonical_json(value)
    assert canonical_json(json.loads(data)) == data
    assert json.loads(data) == value


@QUICK
@given(st.dictionaries(st.text(), values, max_size=6), st.randoms())
def test_the_order_of_keys_never_matters(value: dict[str, Json], random: np.random.Generator):
    items = list(value.items())
    random.shuffle(items)
    assert fingerprint(dict(items)) == fingerprint(value)


@QUICK
@given(st.dictionaries(st.text().filter(lambda key: key != "checksum"), values, max_size=4))
def test_sealed_json_reads_back(value: dict[str, Json]):
    assert canonical_json(unseal_json(seal_json(value))) == canonical_json(value)
