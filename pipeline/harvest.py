"""The harvest stage: prompts -> exactly shuffled Zarr shards of activations, a window at a time.

While the model computes window k + 1, one writer thread writes, hashes and journals window k; so at most two windows
are in memory. A window depends on the series (the spec without the number of windows) and its index alone, and model
batches never straddle windows, so a killed harvest computes again only what its journal lacks and ends with the same
bytes. Statistics are kept per window and folded in the windows' order for the same reason.
"""

from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from pipeline import language_model
from pipeline.config import HarvestConfig
from pipeline.language_model import LanguageModel
from pipeline.progress import Advance
from pipeline.statistics import Moments
from pipeline.tokens import TokenTable
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.atomic import require_free
from storage.certificate import certify
from storage.errors import InputError, NumericsError
from storage.fingerprint import Json
from storage.order import MIN_POOL_CHUNKS
from storage.reader import BatchOrder, ShardReader
from storage.shards import Layout, WindowBuffer, create_group, prompt_order

OUTPUT_VERSION = 1
STATISTICS = "statistics.safetensors"

_LANES = 8
_CERTIFIED_BATCH_ROWS = 4096


def harvest(config: HarvestConfig, tokens: Artifact, workspace: Workspace) -> Made:
    """Makes, or finds, the activations of a tokens artifact.

    Raises:
        UnknownHook: the model has no such hook.
        InputError: the tokens do not fill one window, or are not the model's.
        StorageFull: the planned store does not fit the disk; nothing was written.
        NumericsError: a value is not finite or overflows the encoding; its prompt is named.
    """
    identity = language_model.identity(config.language_model)
    n_windows = _windows(config, tokens)
    settings = config.model_dump(mode="json", exclude={"language_model", "n_windows"})
    spec = Spec(
        "harvest",
        OUTPUT_VERSION,
        {**settings, "n_windows": n_windows, "model": identity},
        {"tokens": tokens.as_parent()},
    )
    return workspace.make(spec, _Harvesting(config, n_windows, tokens, workspace).produce)


def mean_activation(activations: Artifact) -> npt.NDArray[np.float32]:
    """Mean of each neuron over the whole artifact, (d_in,)."""
    return moments(activations).mean.astype(np.float32)


def moments(activations: Artifact) -> Moments:
    """The artifact's per-neuron statistics."""
    return Moments.from_arrays(safetensors.numpy.load_file(activations.file(STATISTICS)))


@dataclass
class _Harvesting:
    """One run of the stage."""

    config: HarvestConfig
    n_windows: int
    tokens: Artifact
    workspace: Workspace

    def produce(self, staging: Staging) -> Result:
        """Computes the windows that the journal lacks, then the statistics over all."""
        table = TokenTable(self.tokens)
        model = language_model.load(self.config.language_model, device=self.workspace.runtime.device)
        model.check_hook(self.config.hook_name)
        _check_tokens(model, table)
        layout = self._layout(model, table)
        missing = [window for window in range(self.n_windows) if _unit(window) not in staging.finished]
        require_free(staging.folder, layout.bytes * len(missing) // self.n_windows)
        create_group(staging.folder, layout)
        order = prompt_order(self.config.seed, table.n_prompts("train"))
        done = (self.n_windows - len(missing)) * layout.window_rows
        with (
            self.workspace.reporter.track("harvest", layout.n_rows, "rows", start=done) as advance,
            _one_writer() as write,
        ):
            for window in missing:
                prompts = order[window * layout.window_prompts : (window + 1) * layout.window_prompts]
                buffer, sums = self._window(model, table, layout, window, prompts, advance)
                write(staging, buffer, sums)
        total = self._fold(staging, layout)
        certificate = _certify(ShardReader(staging.folder, staging.spec.id), layout)
        remainder = table.n_prompts("train") - self.n_windows * layout.window_prompts
        return Result({"language_model": model.name, **_stats(layout, total, remainder), "certificate": certificate})

    def _layout(self, model: LanguageModel, table: TokenTable) -> Layout:
        probe = model.activations(table.ids("train", [0]), self.config.hook_name)
        return Layout(
            n_windows=self.n_windows,
            window_prompts=self.config.window_prompts,
            first_position=0 if self.config.include_bos else 1,
            positions=table.prompt_tokens - (0 if self.config.include_bos else 1),
            d_in=probe.shape[-1],
            chunk_rows=self.config.chunk_rows,
            encoding=self.config.encoding,
            seed=self.config.seed,
            n_prompts=table.n_prompts("train"),
        )

    def _window(
        self, model: LanguageModel, table: TokenTable, layout: Layout, window: int, prompts: npt.NDArray[np.int64],
        advance: Advance,
    ) -> tuple[WindowBuffer, Moments]:  # fmt: skip
        buffer, sums = WindowBuffer(layout, window, prompts), Moments.empty(layout.d_in)
        step = self.config.model_batch_prompts
        for start in range(0, len(prompts), step):
            numbers = prompts[start : start + step]
            batch = model.activations(table.ids("train", numbers), self.config.hook_name)[
                :, layout.first_position :
            ].float()
            sums.add(batch, stride=self.config.second_moment_stride)
            buffer.add(start, batch.cpu().numpy())
            advance(batch.shape[0] * batch.shape[1])
        return buffer, sums

    def _fold(self, staging: Staging, layout: Layout) -> Moments:
        total = Moments.empty(layout.d_in)
        for window in range(self.n_windows):
            arrays = safetensors.numpy.load_file(staging.path(_statistics_name(window)))
            total = total.merge(Moments.from_arrays(arrays))
        staging.write_bytes(STATISTICS, safetensors.numpy.save(total.to_arrays()))
        return total


class _WindowWriter:
    """Writes one window behind the computation; an error of the writer surfaces at the next call."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool = pool
        self._pending: Future[None] | None = None

    def __call__(self, staging: Staging, buffer: WindowBuffer, sums: Moments) -> None:
        self.wait()
        self._pending = self._pool.submit(_write_window, staging, buffer, sums)

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


@contextmanager
def _one_writer() -> Generator[_WindowWriter]:
    with ThreadPoolExecutor(1, "sparsemill-writer") as pool:
        writer = _WindowWriter(pool)
        yield writer
        writer.wait()


def _write_window(staging: Staging, buffer: WindowBuffer, sums: Moments) -> None:
    name = _statistics_name(buffer.window)
    staging.write_bytes(name, safetensors.numpy.save(sums.to_arrays()))
    staging.finish(_unit(buffer.window), [*buffer.write(staging.folder), name])


def _unit(window: int) -> str:
    return f"window-{window:05d}"


def _statistics_name(window: int) -> str:
    return f"statistics/window-{window:05d}.safetensors"


def _windows(config: HarvestConfig, tokens: Artifact) -> int:
    whole = facts(tokens)["train"]["prompts"] // config.window_prompts
    wanted = config.n_windows or whole
    if not 0 < wanted <= whole:
        raise InputError(
            "the tokens artifact holds too few training prompts", where=tokens.id,
            found=f"{facts(tokens)['train']['prompts']:,} prompts, {whole} whole windows",
            expected=f"{max(wanted, 1)} windows of {config.window_prompts:,} prompts",
            remedy="tokenize more, or take smaller or fewer windows (harvest.window_prompts, harvest.n_windows)",
        )  # fmt: skip
    return wanted


def _check_tokens(model: LanguageModel, table: TokenTable) -> None:
    expected = model.identity["tokenizer_sha256"]
    found = str(table.artifact.config["tokenizer_sha256"])
    if found != expected:
        raise InputError(
            "the prompts were made with another tokenizer than the model's", where=table.artifact.id,
            found=f"tokenizer sha256 {found[:12]}", expected=f"{expected[:12]} of model {model.name}",
            remedy="tokenize with tokenize.language_model set to the model that is harvested",
        )  # fmt: skip
    if table.prompt_tokens > model.n_ctx:
        raise InputError(
            "prompts are longer than the model's context", where=table.artifact.id,
            found=table.prompt_tokens, expected=f"at most {model.n_ctx}",
        )  # fmt: skip


def _certify(reader: ShardReader, layout: Layout) -> dict[str, Json]:
    """Measures how well batches are mixed with the smallest pool the reader accepts; refuses a store that fails."""
    batch_rows = min(_CERTIFIED_BATCH_ROWS, layout.n_rows // _LANES * _LANES)
    order = BatchOrder(seed=0, batch_rows=batch_rows, pool_rows=MIN_POOL_CHUNKS * layout.chunk_rows, lanes=_LANES)
    certificate = certify(reader, order)
    if not certificate.passed:
        raise NumericsError(
            "the shuffle's certificate failed: batches hold too many, or too few, rows of one prompt",
            found=f"{certificate.pair_ratio:.4f} of the uniform rate (standard error {certificate.standard_error:.4f})",
            expected="1, within 0.05, or within 4 standard errors below 8M rows",
            remedy="this is a defect of the store: please report it with the layout",
        )
    return certificate.to_json()


def _stats(layout: Layout, total: Moments, remainder: int) -> dict[str, Any]:
    return {
        "rows": layout.n_rows,
        "windows": layout.n_windows,
        "shards": layout.n_shards,
        "activation_bytes": layout.bytes,
        "d_in": layout.d_in,
        "positions": layout.positions,
        "prompts_left_out": remainder,
        "mean_activation_norm": float(np.linalg.norm(total.mean)),
        "second_moment_rows": total.sampled_rows,
    }
