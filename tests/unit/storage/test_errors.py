import pickle

import pytest

from storage import errors
from storage.errors import ConfigError, NumericsError, SparsemillError, StorageFull


def test_message_names_place_found_expected_and_remedy_in_this_order():
    error = ConfigError("bad size", where="harvest.chunk_rows", found=3, expected="a divisor of 8", remedy="choose 4")
    assert str(error) == "bad size; where: harvest.chunk_rows; found 3; expected a divisor of 8; choose 4"


def test_message_leaves_out_what_is_not_known():
    assert str(ConfigError("bad size")) == "bad size"
    assert str(ConfigError("bad size", found=0)) == "bad size; found 0"


def test_each_class_has_a_kind_of_its_own():
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, SparsemillError)]
    assert len(classes) > 10
    assert len({c.kind for c in classes}) == len(classes)


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("bad", where="here", found=1, expected=2, remedy="stop"),
        StorageFull("full", needed_bytes=10, free_bytes=3, where="/disk"),
        NumericsError("infinite", row=4, found=float("inf")),
    ],
)
def test_errors_cross_processes_whole(error: SparsemillError):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_storage_full_tells_needed_and_free_bytes():
    error = StorageFull("full", needed_bytes=2048, free_bytes=100)
    assert (error.needed_bytes, error.free_bytes) == (2048, 100)
    assert "2,048 bytes" in str(error)
    assert "100 bytes free" in str(error)
