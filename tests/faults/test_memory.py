"""Peak memory of real processes: within what is stated beforehand, and not growing with the number of rows.

Rows are synthetic and narrow, so that there can be many: 20 times the demo's 1,560,576 in the long form. A process
opens what it needs and reads a little first, as libraries and compiled code are not what is counted here.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.lengths import LONG, times

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
elif what == "direction":
    from pipeline.analysis import Context
    from pipeline.analysis.direction_pass import project_rows
    from sae.autoencoder import Autoencoder
    sae = Autoencoder(torch.ones(4, 1), torch.ones(1), torch.ones(1, 4), torch.zeros(4))
    context = Context(sae=sae, hook_name="", reader=reader)
    along, edges = np.eye(reader.d_in)[0], np.linspace(-5, 5, 201)
    project_rows(context, along, edges, n_rows=4 * 16_384, kept=20)
    before = peak_bytes()
    read = project_rows(context, along, edges, n_rows=reader.n_rows, kept=20).n_rows
    needs = 4 * 16_384 * (4 * reader.d_in + 2 * reader.d_in + 6) + edges.nbytes
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


@pytest.mark.parametrize("what", ["reader", "survey", "direction"])  # all passes over the rows that there are
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
chain = Chain(load_preset(preset, settings), workspace, run_directly)
made, mapped = chain.harvest(), chain.tokenize().manifest.total_bytes
grown = peak_bytes() - needs.pop("resident")
print(json.dumps({"rows": made.stats["rows"], "grown": grown, "needs": sum(needs.values()), "mapped": mapped}))
"""


def harvested(preset: Path, root: Path, *settings: str) -> dict[str, int]:
    command = [sys.executable, "-W", "ignore", "-c", HARVEST, str(preset), str(root), *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_harvest_stays_within_what_it_says_that_it_needs(tiny_preset: Path, tmp_path: Path):
    found = harvested(tiny_preset, tmp_path / "store")
    print(json.dumps({"harvest": found}))
    assert found["rows"] > 0
    assert found["grown"] <= found["needs"]


@pytest.mark.skipif(not LONG, reason="harvests 20 times the demo's rows: a case of the long form")
def test_a_harvest_of_many_rows_takes_more_only_by_what_it_says(tiny_preset: Path, tmp_path: Path):
    """Rows of random ids, so that nothing need be tokenized; one size is the demo's, the other 20 times that.

    The tokens are mapped: their pages count in the peak, though the kernel may take them back.
    """
    found: list[dict[str, int]] = []
    for times_the_demo in (1, 20):
        folder, n_rows = tmp_path / str(times_the_demo), times_the_demo * DEMO_ROWS
        folder.mkdir()
        n_prompts = -(-n_rows // 15) + 4096  # 15 rows each, and no window of what is left over
        write_ids(folder / "ids.parquet", 17 * n_prompts + 20_000)  # some are held out
        source = {"name": "ids", "kind": "tokenized", "files": [str(folder / "ids.parquet")]}
        settings = [f"tokenize.sources={json.dumps([source])}", f"tokenize.train_tokens={16 * n_prompts}"]
        settings += [f"harvest.{setting}" for setting in WIDE]
        found.append(harvested(tiny_preset, folder / "store", *settings))
        assert found[-1]["rows"] >= n_rows
        assert found[-1]["grown"] <= found[-1]["needs"] + found[-1]["mapped"]
        shutil.rmtree(folder)
    print(json.dumps({"harvest of many rows": found}))
    few, many = found
    stated = [one["needs"] + one["mapped"] for one in found]
    assert many["grown"] - few["grown"] <= stated[1] - stated[0] + SLACK_BYTES


WIDE = ("window_prompts=4096", "chunk_rows=256", "model_batch_prompts=64", 'encoding="uint8"')
"""Of a harvest of tiny rows, what makes it quick and small."""


def write_ids(path: Path, n_tokens: int) -> None:
    """Rows of 1,024 ids of the tiny model's vocabulary."""
    rng, schema = np.random.default_rng(0), pa.schema({"tokens": pa.list_(pa.int32())})
    with pq.ParquetWriter(path, schema) as writer:
        for _ in range(-(-n_tokens // 2**20)):
            ids = rng.integers(2, 64, 2**20, np.int32)
            rows = pa.ListArray.from_arrays(np.arange(0, 2**20 + 1, 1024, dtype=np.int32), ids)
            writer.write_table(pa.table({"tokens": rows}, schema))


def test_a_report_on_many_features_stays_within_its_files_and_twice_its_tables():
    """Twice the demo's features, or 20 times; what pipeline/report/writer.py says."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.large_report", str(times(2, 20) * DEMO_FEATURES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"report": found}))
    assert found["grown"] <= found["files"] + 2 * found["tables"] + SLACK_BYTES
