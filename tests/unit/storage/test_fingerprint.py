import enum
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from storage.errors import InputError
from storage.fingerprint import canonical_json, fingerprint, seal_json, sha256_file, unseal_json


class Colour(enum.StrEnum):
    RED = "red"


def test_keys_are_sorted_at_every_depth_and_spaces_left_out():
    value = {"b": [1, {"z": None, "a": True}], "a": "é"}
    assert canonical_json(value) == '{"a":"é","b":[1,{"a":true,"z":null}]}'.encode()


def test_order_of_keys_and_kind_of_sequence_do_not_matter():
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})


def test_fingerprint_is_the_sha256_of_the_canonical_json():
    assert fingerprint([1]) == hashlib.sha256(b"[1]").hexdigest()


def test_integers_floats_booleans_and_strings_of_one_look_differ():
    assert len({fingerprint(value) for value in (1, 1.0, True, "1", [1])}) == 5


@pytest.mark.parametrize("value", [0.1, 1e300, 5e-324, -0.0, 2.0**53, 1 / 3])
def test_floats_read_back_exactly(value: float):
    assert json.loads(canonical_json(value)) == value


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1, float("nan")]}, "$.a[1]"),
        ({"a": float("inf")}, "$.a"),
        ({"a": {1, 2}}, "$.a"),
        ({"a": b"x"}, "$.a"),
        ({"a": Path("x")}, "$.a"),
        ({"a": np.float64(1)}, "$.a"),
        ({"a": np.int64(1)}, "$.a"),
        ({"a": Colour.RED}, "$.a"),
        ({"a": {1: "x"}}, "$.a"),
        ({"a": "\ud800"}, "$.a"),
    ],
)
def test_what_has_no_stable_form_is_refused_with_its_place(value: object, place: str):
    with pytest.raises(InputError) as caught:
        canonical_json(value)  # pyright: ignore[reportArgumentType]
    assert caught.value.where == place


def test_another_process_with_another_hash_seed_finds_the_same_fingerprint():
    value = {"b": 1.5, "a": ["x", None], "c": {"k": 2, "j": 3}}
    code = f"from storage.fingerprint import fingerprint; print(fingerprint({value!r}))"
    environment = {"PYTHONHASHSEED": "12345", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == fingerprint(value)


def test_sha256_of_a_file_longer_than_the_buffer(tmp_path: Path):
    data = bytes(range(256)) * 5000
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_sealed_json_reads_back():
    assert unseal_json(seal_json({"a": [1, 2]})) == {"a": [1, 2]}


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b'{"a":1}', b'{"a":1,"checksum":"00"}', b"\xff", b"{"])
def test_what_was_not_sealed_is_refused(data: bytes):
    with pytest.raises(ValueError):
        unseal_json(data)


def test_every_single_flipped_bit_of_sealed_json_is_seen():
    sealed = seal_json({"name": "x", "n": 3})
    for i in range(len(sealed) * 8):
        flipped = bytearray(sealed)
        flipped[i // 8] ^= 1 << i % 8
        with pytest.raises((ValueError, InputError)):
            unseal_json(bytes(flipped))
