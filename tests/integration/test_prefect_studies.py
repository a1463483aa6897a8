"""The studies' flows, in one process with Prefect's own server: each does what its study does, with its parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import studies
from tests.integration import test_studies
from tests.integration.test_studies import FEW, chain

ROOT = Path(__file__).parents[2]
STUDIES = test_studies.STUDIES | {"cross_seed": studies.cross_seed(3)}
PARAMETERS: dict[str, dict[str, Any]] = {  # theirs, as a form gives them
    "cross_seed": {"seeds": 3},
    "orthogonal_rerun": {"features": [1, 2, 3]},
    "encoder_sparsity": {"l1": [1e-4], "l2": [1e-3]},
    "site_comparison": {"l1_factors": [1.0, 3.0]},
}
RUNS = """
import json, sys
from flows import studies
common, parameters = map(json.loads, sys.argv[1:])
ended = {}
for name, own in parameters.items():
    state = getattr(studies, name)(**common, **own, return_state=True)
    ended[name] = [state.name, state.message]
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def ended(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """A store in which the flows made everything; name and message of the state that each ended in."""
    home = tmp_path_factory.mktemp("studies")
    common = {"preset": str(tiny_preset), "overrides": [*FEW], "root": str(home / "store"), "threads": 1}
    environment = os.environ | {
        "PREFECT_HOME": str(home / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUNS, json.dumps(common), json.dumps(PARAMETERS)],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return home / "store", json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", STUDIES)
def test_a_flow_made_what_its_study_asks_for(
    name: str, ended: tuple[Path, dict[str, list[str]]], tiny_preset: Path
) -> None:
    root, states = ended
    asked = chain(tiny_preset, root)
    report = STUDIES[name].run(asked, None)
    assert {stage.made.status for stage in asked.runs} == {"cached"}
    assert states[name] == ["Completed", report.id]
