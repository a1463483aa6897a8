import io
from pathlib import Path

import pytest
import torch

from pipeline.tensor_files import load_pt
from storage.errors import InputError


def test_tensors_are_read(tmp_path: Path):
    torch.save({"W_enc": torch.arange(6.0)}, tmp_path / "25.pt")
    found = load_pt(tmp_path / "25.pt")
    assert isinstance(found, dict)
    assert torch.equal(found["W_enc"], torch.arange(6.0))


@pytest.mark.parametrize("prefix", [b"s", b"q", b"\x80", b"(", b"PK\x03\x04"])
def test_bytes_that_torchs_parser_stumbles_over_are_bad_input(prefix: bytes, tmp_path: Path):
    good = io.BytesIO()
    torch.save({"W_enc": torch.ones(3)}, good)
    (tmp_path / "25.pt").write_bytes(prefix + good.getvalue())
    with pytest.raises(InputError, match=r"25\.pt"):
        load_pt(tmp_path / "25.pt")


def test_a_file_that_is_not_there_is_not_taken_for_a_damaged_one(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load_pt(tmp_path / "25.pt")
