"""How fast this machine harvests and trains, measured in seconds with the stages' own parts on random tokens.

A window of random prompts goes through the preset's model (``WindowHarvester``); shards of the run's true size are
written, hashed and made durable on the store's file system; then both at once, bytes in step, as a harvest does it:
its rate is the measured one of both together, so cores and memory that they share are accounted for. Shards of such
rows are then read by the real reader while the real trainer steps, on the run's device, its biases calibrated to the L0
that a run is expected to have, since a step's cost follows L0. Everything is written in one temporary folder that is
removed.

What this does not see: other load that comes or goes, a disk's cache that a long run outruns, a clock that heat lowers,
texts' tokens (a pass costs the same; activations differ), an L0 that ends elsewhere, steps taken dense at the start of
a run whose biases begin at zero, evaluations and checkpoints. Rejected: extrapolating from published figures or flops.
"""

import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from pipeline.language_model import LanguageModel
from pipeline.memory import size
from pipeline.parallel import own_device
from pipeline.planning.sizes import Figures, RunPlan, Subject
from pipeline.progress import Quiet
from pipeline.tokens import TokenTable
from pipeline.torch_batches import to_device
from pipeline.windows import Window, WindowHarvester, single_threaded
from pipeline.workspace import Workspace
from sae.config import TrainerConfig
from sae.trainer import Trainer
from storage import atomic
from storage.encoding import Floats
from storage.reader import ShardReader
from storage.shards import Layout, WindowBuffer, create_group

EXPECTED_L0 = 60.0
"""L0 that steps are timed at where the preset names no target; the published autoencoders' is of this size."""

_PHASE_SECONDS = 2.0
_SHARD_BYTES = 128 * 2**20  # written at once, at most, unless one shard is more
_WARM_STEPS = 2
_MIN_STEPS, _MAX_STEPS = 3, 40
_START_ROWS = 8192


class Calibration(Figures):
    """Rates measured."""

    compute_rows_per_second: float
    """Forward passes to the hooks, sums, encoding and scattering, while nothing is written; rows of one site."""
    write_bytes_per_second: float
    """Hashing, writing and making durable shards of the run's size, while nothing is computed."""
    harvest_rows_per_second: float
    """Both at once; rows of one site."""
    read_rows_per_second: float
    """The reader alone."""
    read_from: str
    """``page cache``, or ``disk`` where the store is larger than the memory that is free to cache it."""
    step_seconds: float
    """A training step, its batch read meanwhile; with a live source, its batch computed besides."""
    step_l0: float
    """Mean L0 of the steps timed."""
    engine: str
    """What took them."""
    steps: int
    """Steps timed."""
    load: float | None
    """Load average of the last minute before it began."""
    threads: int
    """CPU threads used."""
    seconds: float
    """What it took altogether."""

    def harvest_seconds(self, run: RunPlan) -> float:
        """Time of a harvest: the first window computed, the last one written, the others both at once."""
        store = run.stores[0]
        rows = store.rows / store.windows
        window_bytes = sum(store.bytes for store in run.stores) / store.windows
        first, last = rows / self.compute_rows_per_second, window_bytes / self.write_bytes_per_second
        return first + last + (store.windows - 1) * rows / self.harvest_rows_per_second

    def train_seconds(self, run: RunPlan) -> float:
        """Time of a training's steps."""
        return run.training.steps * self.step_seconds


@dataclass(frozen=True)
class _Sample:
    """Rows of random prompts, and the shards that hold them."""

    rows: Floats
    buffer: WindowBuffer


def calibrate(subject: Subject, model: LanguageModel, workspace: Workspace, *, cached: bool) -> Calibration:
    """Measures harvest and training for some seconds each.

    Args:
        subject: what is planned.
        model: its language model.
        workspace: says what is measured, and where the store is.
        cached: whether the run's store will fit the memory that is free to cache it.
    """
    began, load = time.monotonic(), _load_average()
    with _scratch_folder(workspace.runtime.root) as folder:
        compute, write, both, sample = _harvest_rates(subject, model, workspace, folder)
        reader = _store(sample, folder / "store", cached=cached)
        read = _read_rate(subject, reader, workspace)
        _forget(reader.folder, cached=cached)
        step, l0, engine, steps = _step_time(subject, reader, sample.rows, workspace)
    if subject.preset.train.source == "live":
        step += subject.preset.train.autoencoder.batch_rows / compute  # forward passes and steps share the device
    return Calibration(
        compute_rows_per_second=compute,
        write_bytes_per_second=write,
        harvest_rows_per_second=both,
        read_rows_per_second=read,
        read_from="page cache" if cached else "disk",
        step_seconds=step,
        step_l0=l0,
        engine=engine,
        steps=steps,
        load=load,
        threads=workspace.threads,
        seconds=time.monotonic() - began,
    )


def temporary_bytes(subject: Subject) -> int:
    """The most that a calibration has on the disk at one time."""
    return 4 * max(_SHARD_BYTES, subject.layouts[0].arrays()["activations"].shard_bytes)


class _RandomPrompts:
    """Prompts of uniformly random tokens after a BOS, where a ``TokenTable`` is asked for."""

    def __init__(self, model: LanguageModel, prompt_tokens: int):
        self._model = model
        self._prompt_tokens = prompt_tokens

    def ids(self, split: str, numbers: npt.NDArray[np.integer[Any]]) -> torch.Tensor:  # noqa: ARG002
        """Token ids, int64 (n, prompt_tokens); the same for the same numbers."""
        random = torch.Generator().manual_seed(int(numbers[0]))
        tokens = torch.randint(self._model.d_vocab, (len(numbers), self._prompt_tokens), generator=random)
        tokens[:, 0] = self._model.bos_id
        return tokens


@dataclass(frozen=True)
class _Bench:
    """Computes windows of random prompts at every site."""

    subject: Subject
    model: LanguageModel
    threads: int

    def compute(self, n_prompts: int) -> Window:
        """A window of so many prompts; returns the first site's."""
        config = self.subject.preset.harvest
        layouts = {
            site.hook_name: replace(
                layout, n_windows=1, n_prompts=n_prompts, window_prompts=n_prompts, chunk_rows=n_prompts
            )
            for site, layout in zip(self.subject.sites, self.subject.layouts, strict=True)
        }
        prompts = _RandomPrompts(self.model, self.subject.preset.tokenize.prompt_tokens)
        table = cast("TokenTable", prompts)  # of which ids() alone is used
        with (
            single_threaded(),
            WindowHarvester(
                self.model,
                table,
                layouts,
                model_batch_prompts=config.model_batch_prompts,
                second_moment_stride=config.second_moment_stride,
                threads=self.threads,
            ) as harvester,
            Quiet().track("", 0, "") as advance,
        ):
            return harvester.compute(0, list(layouts), advance)[self.subject.sites[0].hook_name]


def _harvest_rates(
    subject: Subject, model: LanguageModel, workspace: Workspace, folder: Path
) -> tuple[float, float, float, _Sample]:
    """Rows a second computed alone, bytes a second written alone, rows a second with both, and what was written."""
    say, positions = workspace.reporter.say, subject.layouts[0].positions
    bench, batch = _Bench(subject, model, workspace.threads), subject.preset.harvest.model_batch_prompts
    bench.compute(batch * workspace.threads)  # the first passes set things up
    few = 2 * batch * workspace.threads
    target_rows = few * positions / _timed(lambda: bench.compute(few)) * _PHASE_SECONDS
    layout = _shards_of_true_size(subject, target_rows)
    # Rows of all sites are written with the first site's shards, as many bytes as there are.
    row_bytes = sum(other.bytes / other.n_rows for other in subject.layouts)
    writes = max(1, min(8, round(target_rows * row_bytes / layout.bytes)))
    prompts = max(1, round(writes * layout.bytes / row_bytes / positions / batch)) * batch
    began = time.monotonic()
    window = bench.compute(prompts)
    compute = prompts * positions / (time.monotonic() - began)
    say(f"  forward and encode alone: {compute:,.0f} rows/s ({prompts} prompts)")
    sample = _sample(window, layout, folder / "rows")
    write = layout.bytes / _timed(lambda: _write(sample, folder / "alone", 1))
    say(f"  write alone: {size(write)}/s ({layout.n_shards} shards of {size(layout.bytes / layout.n_shards)})")

    def both() -> None:
        with ThreadPoolExecutor(1) as writer:
            writing = writer.submit(_write, sample, folder / "both", writes)
            bench.compute(prompts)
            writing.result()

    together = prompts * positions / _timed(both)
    say(f"  both at once: {together:,.0f} rows/s")
    return compute, write, together, sample


def _shards_of_true_size(subject: Subject, target_rows: float) -> Layout:
    """One window of a few of the first site's shards: enough for two batches, at most what the phase can fill."""
    layout = subject.layouts[0]
    shard_bytes = layout.bytes / layout.n_shards
    fewest = -(-2 * subject.preset.train.autoencoder.batch_rows // layout.window_prompts)
    wanted = min(target_rows / layout.window_prompts, _SHARD_BYTES / shard_bytes)
    shards = min(layout.positions, max(1, fewest, int(wanted)))
    return replace(layout, n_windows=1, n_prompts=layout.window_prompts, positions=shards)


def _sample(window: Window, layout: Layout, folder: Path) -> _Sample:
    """Rows as they are read back, and a window of shards of true size filled with them, again and again if need be."""
    create_group(folder, window.buffer.layout)
    window.buffer.write(folder)
    reader = ShardReader(folder, "calibration")
    rows = reader.read(0, min(reader.n_rows, layout.n_rows)).rows
    atomic.remove_tree(folder)
    buffer = WindowBuffer(layout, 0)
    filled = np.resize(rows, (layout.n_rows, layout.d_in))
    buffer.add(0, filled.reshape(layout.window_prompts, layout.positions, layout.d_in))
    return _Sample(rows, buffer)


def _write(sample: _Sample, folder: Path, times: int) -> None:
    for _ in range(times):
        atomic.sync_files([folder / name for name in sample.buffer.write(folder)], top=folder)


def _store(sample: _Sample, folder: Path, *, cached: bool) -> ShardReader:
    create_group(folder, sample.buffer.layout)
    _write(sample, folder, 1)
    _forget(folder, cached=cached)
    return ShardReader(folder, "calibration")


def _read_rate(subject: Subject, reader: ShardReader, workspace: Workspace) -> float:
    def read() -> None:
        with reader.epoch(subject.order) as batches:
            for _ in batches:
                pass

    rate = reader.n_rows / _timed(read)
    workspace.reporter.say(f"  read alone: {rate:,.0f} rows/s")
    return rate


def _step_time(
    subject: Subject, reader: ShardReader, rows: Floats, workspace: Workspace
) -> tuple[float, float, str, int]:
    """Seconds of a step with its reading, mean L0, engine, and the number of steps timed."""
    device = own_device(workspace.runtime.device)
    sample = torch.from_numpy(rows).to(device)
    trainer = Trainer.start(
        _at_expected_l0(subject.preset.train.autoencoder),
        reader.d_in,
        sample[:_START_ROWS],
        sample.mean(dim=0),
        threads=workspace.threads,
    )
    l0: list[float] = []
    engine, began = "", 0.0
    with reader.batches(subject.order) as read:
        batches = to_device(read, device)
        while len(l0) < _MIN_STEPS or (time.monotonic() - began < _PHASE_SECONDS and len(l0) < _MAX_STEPS):
            if trainer.steps_taken == _WARM_STEPS:
                began = _time_when_done(device)
            metrics = trainer.step(next(batches).rows)
            if metrics.step > _WARM_STEPS:
                l0.append(metrics.l0)
                engine = metrics.engine
        seconds = (_time_when_done(device) - began) / len(l0)
    mean = sum(l0) / len(l0)
    workspace.reporter.say(f"  step with reading: {seconds:.3f} s (L0 {mean:.0f}, {engine} engine, {len(l0)} steps)")
    return seconds, mean, engine, len(l0)


def _at_expected_l0(config: TrainerConfig) -> TrainerConfig:
    """The same training at the L0 that most of its steps will have, and kept there: it learns next to nothing."""
    target = config.target_l0 or min(EXPECTED_L0, config.d_sae / 4)
    return config.model_copy(update={"b_enc_init": "calibrated", "target_l0": target, "learning_rate": 1e-12})


def _time_when_done(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


@contextmanager
def _scratch_folder(root: Path) -> Generator[Path]:
    """A folder on the file system of ``root``, which need not exist, removed at the end."""
    existing = root.absolute()
    while not existing.is_dir():
        existing = existing.parent
    folder = existing / f".sparsemill-plan-{os.getpid()}"
    atomic.make_folder(folder, durable=False)
    try:
        yield folder
    finally:
        atomic.remove_tree(folder)


def _forget(folder: Path, *, cached: bool) -> None:
    """Asks the kernel to drop a folder's (durable) files from its cache, unless they are to be read from there."""
    if cached or not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
