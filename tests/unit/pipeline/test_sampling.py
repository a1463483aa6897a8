"""How many windows a person means; what a sample is made of is tested in ``tests/integration/test_sharing.py``."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import sampling
from pipeline.sampling import count_windows
from storage.artifact import Artifact
from storage.errors import InputError
from storage.manifest import Manifest, Spec

HARVEST = Artifact(Path(), Manifest(Spec("harvest", 1, {}), {}, {}, {}), "")


def counted(text: str, n_windows: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sampling.harvest, "recorded_layout", lambda _: SimpleNamespace(n_windows=n_windows))
    return count_windows(text, HARVEST)


@pytest.mark.parametrize(
    ("text", "n_windows", "count"),
    [
        ("1%", 9, 1), ("1%", 100, 1), ("1%", 101, 2), ("1%", 762, 8), ("0.5%", 1000, 5), ("29%", 100, 29),
        ("100%", 7, 7), (" 3 ", 7, 3), ("7", 7, 7),
    ],
)  # fmt: skip
def test_a_share_is_rounded_up_to_whole_windows(text: str, n_windows: int, count: int, monkeypatch: pytest.MonkeyPatch):
    assert counted(text, n_windows, monkeypatch) == count


@pytest.mark.parametrize("text", ["0", "8", "0%", "-1%", "101%", "1 %%", "nan%", "inf", "one"])
def test_what_is_no_number_of_windows_is_refused(text: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="1 to 7, or such as 1% of the 7"):
        counted(text, 7, monkeypatch)
