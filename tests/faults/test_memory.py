"""Peak memory of real processes: within what is stated beforehand, and not growing with the number of rows.

Rows are synthetic and narrow, so that there can be many: 20 times the demo's 1,560,576 in the long form. A process
opens what it needs and reads a little first, as libraries and compiled code are not what is counted here.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.lengths import times

ROOT = Path(__file__).parents[2]
DEMO_ROWS = 1_560_576
DEMO_FEATURES = 4_096
SLACK_BYTES = 8 * 2**20
"""What an allocator and threads' stacks may take besides: nothing that grows with the rows."""

CHILD = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from tests.faults.peak import peak_bytes
from pipeline.memory import resident_bytes
from storage.shards import Layout, WindowBuffer, create_group
from storage.reader import BatchOrder, ShardReader

what, folder, n_windows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
LAYOUT = Layout(n_windows=n_windows, window_prompts=2048, positions=32, d_in=4, chunk_rows=256, encoding="float16",
                seed=0, n_prompts=2048 * n_windows)

def write(layout):
    create_group(folder, layout)
    rng = np.random.default_rng(0)
    buffer = None
    for window in range(layout.n_windows):
        buffer = WindowBuffer(layout, window, reuse=buffer)
        rows = rng.standard_normal((layout.window_prompts, layout.positions, layout.d_in), np.float32)
        buffer.add(0, rows)
        buffer.write(folder)

if what == "write":
    write(LAYOUT)
    print(json.dumps({"rows": LAYOUT.n_rows}))
    raise SystemExit
reader = ShardReader(folder, "harvest-0123456789ab")
order = BatchOrder(seed=0, batch_rows=4096, pool_rows=65536, lanes=8)
if what == "reader":
    with reader.epoch(order) as batches:
        first = len(next(batches).rows)
        before = peak_bytes()
        read = first + sum(len(batch.rows) for batch in batches)
    needs = reader.pool_bytes(order) + 4 * 4096 * (4 * reader.d_in + 2 * reader.d_in + 6)
else:
    from pipeline.analysis.surveying import Places, SurveyState
    from pipeline.surveying import _encode
    from sae.autoencoder import Autoencoder
    from sae.kernels.encoder import SparseEncoder
    torch.manual_seed(0)
    d_sae, places = 64, Places(16, 128, 256)
    sae = Autoencoder(torch.randn(4, d_sae), torch.full((d_sae,), -2.5), torch.randn(d_sae, 4), torch.zeros(4))
    encoder, state, before, read = SparseEncoder(sae, threads=1), SurveyState.empty(d_sae, places), 0, 0
    for encoded in _encode(reader, encoder, range(reader.n_rows), prefetch=2):
        state.take(*encoded)
        read += len(encoded.prompt)
        before = before or (peak_bytes() if read >= 8 * 4096 else 0)
    needs = sum(array.nbytes for array in state)
print(json.dumps({"rows": read, "grown": peak_bytes() - before, "needs": needs}))
"""


def measured(what: str, folder: Path, windows: int) -> dict[str, int]:
    command = [sys.executable, "-W", "ignore", "-c", CHILD, what, str(folder), str(windows)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A store of somewhat more rows than the demo's, or of 20 times as many."""
    folder, windows = tmp_path_factory.mktemp("rows"), times(32, -(-20 * DEMO_ROWS // 65_536))
    return folder, measured("write", folder, windows)["rows"]


@pytest.mark.parametrize("what", ["reader", "survey"])
def test_a_pass_over_all_rows_stays_within_its_budget(what: str, store: tuple[Path, int]):
    found = measured(what, store[0], 1)
    print(json.dumps({what: found}))
    assert found["rows"] == store[1]
    assert found["grown"] <= found["needs"] + SLACK_BYTES


HARVEST = """
import json, sys
from pathlib import Path
from pipeline import harvest, memory, tokens
from pipeline.config import Runtime, load_preset
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from tests.faults.peak import peak_bytes
preset, root, *settings = sys.argv[1:]
needs, require = {}, harvest.require_memory
def noted(layouts, **more):
    needs.update(memory.harvest_needs(layouts, **more), resident=memory.resident_bytes())
    require(layouts, **more)
harvest.require_memory = noted
workspace = Workspace.open(Runtime(root=Path(root), threads=1), Quiet())
made = Chain(load_preset(preset, settings), workspace, run_directly).harvest()
grown = peak_bytes() - needs.pop("resident")
print(json.dumps({"rows": made.stats["rows"], "grown": grown, "needs": sum(needs.values())}))
"""


def test_a_harvest_stays_within_what_it_says_that_it_needs(tiny_preset: Path, tmp_path: Path):
    command = [sys.executable, "-W", "ignore", "-c", HARVEST, str(tiny_preset), str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"harvest": found}))
    assert found["rows"] > 0
    assert found["grown"] <= found["needs"]


def test_a_report_on_many_features_stays_within_its_files_and_twice_its_tables():
    """Twice the demo's features, or 20 times; what pipeline/report/writer.py says."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.large_report", str(times(2, 20) * DEMO_FEATURES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"report": found}))
    assert found["grown"] <= found["files"] + 2 * found["tables"] + SLACK_BYTES
