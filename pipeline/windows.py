"""One window of prompts through the model: at every site wanted, its rows shuffled, encoded, hashed and summed.

Model batches of a fixed composition are shared out over worker threads, each with one thread of its own for the
arithmetic. So a row's bits depend on the batch alone, whatever the number of threads; nothing waits at barriers; and
the rest of one batch's work (encoding, shuffling, sums) runs beside another's products instead of after them. On a CUDA
device two workers, each with a stream of its own, overlap one batch's copy to the host with the next one's pass.

Rows become halves, at their places, in one pass that also sums them (storage.fused). On other devices, and for other
encodings, torch casts them where they are. A batch with a value that does not fit, and an encoding that torch has no
type for, take the plain path (``WindowBuffer.add``), which names the prompt.
Memory: a buffer a site for the window being computed, another for the one being written, and a batch a worker.
"""

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch
from torch import Tensor

from pipeline.language_model import LanguageModel
from pipeline.progress import Advance
from pipeline.statistics import Moments, Sums
from pipeline.tokens import TokenTable
from storage import atomic
from storage.encoding import Encoding
from storage.fingerprint import sha256_pieces
from storage.manifest import FileRecord
from storage.shards import Layout, WindowBuffer, prompt_order, window_files

_TORCH_TYPES: dict[Encoding, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_CUDA_WORKERS = 2


@dataclass(frozen=True, eq=False)
class Window:
    """A window of one site, computed and not yet written."""

    buffer: WindowBuffer
    moments: Moments

    def write(self, folder: Path) -> dict[str, FileRecord]:
        """Writes its files, not yet durable; returns what they are by name relative to ``folder``."""
        name = statistics_name(self.buffer.window)
        statistics = safetensors.numpy.save(self.moments.to_arrays())
        atomic.make_folder((folder / name).parent, durable=False)
        atomic.write_file(folder / name, [statistics])
        return self.buffer.write(folder) | {name: FileRecord(len(statistics), sha256_pieces([statistics]))}


def unit_name(window: int) -> str:
    """Name of a window as a unit of the staging folder."""
    return f"window-{window:05d}"


def statistics_name(window: int) -> str:
    """Name of the file of a window's statistics."""
    return f"statistics/window-{window:05d}.safetensors"


def file_names(layout: Layout, window: int) -> list[str]:
    """Names of the files that :meth:`Window.write` writes."""
    return [*window_files(layout, window), statistics_name(window)]


class WindowHarvester:
    """Computes windows of one store or of several that share their prompts; use it in a ``with`` block.

    Args:
        model: the language model.
        table: the prompts.
        layouts: by hook name, the stores; alike but for width and encoding.
        model_batch_prompts: prompts a forward pass.
        second_moment_stride: every how many batches, counted over all windows, one enters the second moment.
        threads: CPU threads to use.
    """

    def __init__(
        self,
        model: LanguageModel,
        table: TokenTable,
        layouts: Mapping[str, Layout],
        *,
        model_batch_prompts: int,
        second_moment_stride: int,
        threads: int,
    ):
        self._model = model
        self._table = table
        self._layouts = layouts
        self._batch = model_batch_prompts
        self._stride = second_moment_stride
        layout = next(iter(layouts.values()))
        self._first_position = layout.first_position
        self._window_prompts = layout.window_prompts
        self._order = prompt_order(layout.seed, layout.n_prompts)
        self._spare: dict[str, WindowBuffer] = {}
        self._on_cuda = model.device.type == "cuda"
        self._pool = ThreadPoolExecutor(_CUDA_WORKERS if self._on_cuda else threads, "sparsemill-harvest")

    def __enter__(self) -> "WindowHarvester":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def compute(self, window: int, hook_names: Sequence[str], advance: Advance) -> dict[str, Window]:
        """Runs the model on a window's prompts.

        Args:
            window: its number.
            hook_names: of the sites wanted.
            advance: told the rows done.

        Returns:
            The window of each site.

        Raises:
            NumericsError: a value is not finite or overflows its encoding; its prompt is named.
        """
        prompts = self._order[window * self._window_prompts : (window + 1) * self._window_prompts]
        windows = {name: self._begin(name, window, prompts) for name in hook_names}
        work = partial(self._take_in, prompts, {name: made.buffer for name, made in windows.items()})
        batches = -(-len(prompts) // self._batch)
        jobs = [
            self._pool.submit(work, number * self._batch, (window * batches + number) % self._stride == 0)
            for number in range(batches)
        ]
        try:
            for job in jobs:
                sums = job.result()
                for name, made in windows.items():
                    made.moments.add(sums[name])
                advance(next(iter(sums.values())).rows)
        finally:
            _cancel(jobs)
        return windows

    def recycle(self, hook_name: str, window: Window) -> None:
        """Takes the memory of a window that was written, for another one of its site."""
        self._spare[hook_name] = window.buffer

    def _begin(self, hook_name: str, window: int, prompts: npt.NDArray[np.integer]) -> Window:
        layout = self._layouts[hook_name]
        buffer = WindowBuffer(layout, window, prompts, reuse=self._spare.pop(hook_name, None))
        return Window(buffer, Moments.empty(layout.d_in))

    def _take_in(
        self, prompts: npt.NDArray[np.integer], buffers: Mapping[str, WindowBuffer], start: int, sampled: bool
    ) -> dict[str, Sums]:
        with torch.inference_mode(), self._stream():
            tokens = self._table.ids("train", prompts[start : start + self._batch])
            found = self._model.activations_at(tokens, list(buffers))
            return {
                name: take_in(buffer, start, found[name][:, self._first_position :], outer=sampled)
                for name, buffer in buffers.items()
            }

    def _stream(self) -> Any:
        return torch.cuda.stream(torch.cuda.Stream()) if self._on_cuda else nullcontext()


def take_in(buffer: WindowBuffer, first_prompt: int, rows: Tensor, *, outer: bool) -> Sums:
    """Encodes a batch's activations into a window's buffer, and sums them.

    Args:
        buffer: of the window.
        first_prompt: index within the window of the batch's first prompt.
        rows: float (n, positions, d_in), on any device.
        outer: whether the batch enters the second moment.
    """
    rows = rows.float()
    n_rows = rows.shape[0] * rows.shape[1]
    product = _outer(rows.flatten(0, 1)).cpu().numpy() if outer else None
    if rows.device.type == "cpu" and buffer.layout.encoding == "float16":
        sums = buffer.fill(first_prompt, rows.numpy())
        if sums is not None:
            return Sums(n_rows, sums.total, sums.low, sums.high, product)
    low, high = rows.amin((0, 1)), rows.amax((0, 1))
    codes = cast_rows(rows.flatten(0, 1), low, high, buffer.layout.encoding)
    if codes is None:
        buffer.add(first_prompt, rows.cpu().numpy())
    else:
        buffer.place(first_prompt, codes)
    total = rows.sum(1).double().sum(0)  # prompt by prompt, as a long sum in float32 loses too much
    return Sums(n_rows, total.cpu().numpy(), low.cpu().numpy(), high.cpu().numpy(), product)


def cast_rows(rows: Tensor, low: Tensor, high: Tensor, encoding: Encoding) -> npt.NDArray[np.generic] | None:
    """Codes of rows within the range of the encoding's torch type; None where the plain path must look closer."""
    dtype = _TORCH_TYPES.get(encoding)
    if dtype is None:
        return None
    limit = torch.finfo(dtype).max
    if not bool((low >= -limit).all() & (high <= limit).all()):  # false for NaN, too
        return None
    codes = rows.to(dtype).cpu()
    return codes.view(torch.uint16).numpy() if dtype is torch.bfloat16 else codes.numpy()


@contextmanager
def single_threaded() -> Generator[None]:
    """Within it torch's operations use one thread each, in every thread that is started there."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _outer(rows: Tensor) -> Tensor:
    return rows.T @ rows


def _cancel(jobs: Sequence[Future[Any]]) -> None:
    for job in jobs:
        job.cancel()
