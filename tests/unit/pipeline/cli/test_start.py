"""Help, and a look at the store, wait for nothing that computes; and what help says is so."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from pipeline.checkpoints import FORMATS
from pipeline.cli import app
from pipeline.report.images import Format
from pipeline.studies import L1_FACTORS

ROOT = Path(__file__).parents[4]
SLOW = ("torch", "numba", "scipy", "plotly", "pyarrow", "tokenizers")


@pytest.mark.parametrize("command", [["--help"], ["artifacts", "ls"], ["presets"], ["report", "images", "--help"]])
def test_they_import_nothing_that_takes_seconds(command: list[str], tmp_path: Path):
    script = f"""
import sys
from pipeline.cli import app
app({command!r}, result_action="return_value")
assert (slow := set({SLOW!r}) & set(sys.modules)) == set(), slow
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={"SPARSEMILL_HOME": str(tmp_path / "none")},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def helped(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    app([*command, "--help"], result_action="return_value")
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_choices_named_in_the_help_are_those_there_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    named = helped(capsys, "export").rpartition("--format")[2].partition(";")[0].replace(",", "").split()[1:]
    assert set(named) == set(FORMATS)
    for one in get_args(Format):
        assert one in helped(capsys, "report", "images")
    assert str(L1_FACTORS) in helped(capsys, "study", "site-comparison")
