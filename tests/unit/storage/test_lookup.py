from pathlib import Path

import numpy as np
import pytest
import zarr

from storage.errors import InputError
from storage.lookup import RowLookup
from storage.shards import GROUP_NAME
from tests.unit.storage.stores import SMALL, write_store


def test_rows_are_where_the_stored_prompt_and_position_say(tmp_path: Path):
    write_store(tmp_path)
    group = zarr.open_group(tmp_path / GROUP_NAME, mode="r")
    prompt, position = (np.asarray(group[name][:], np.int64) for name in ("prompt", "position"))  # pyright: ignore[reportIndexIssue]
    np.testing.assert_array_equal(RowLookup(SMALL).rows(prompt, position), np.arange(SMALL.n_rows))


def test_no_tokens_have_no_rows():
    assert RowLookup(SMALL).rows(np.array([], np.int64), np.array([], np.int64)).shape == (0,)


def test_an_unknown_token_is_named():
    with pytest.raises(InputError, match="prompt 1000, position 2"):
        RowLookup(SMALL).rows(np.array([1000]), np.array([2]))
