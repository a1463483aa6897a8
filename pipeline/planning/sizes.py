"""What a run would be, before any of it is made: rows, bytes, shards, files, memory.

Everything here is arithmetic on a preset, the model's width at each hook and the number of training prompts, by the
very functions that the stages use (``Layout``, the arrays' metadata, the pools of batches), so that a plan and the
artifact made from it agree. Left out, as small: manifests (about 140 bytes a file), the table of documents, the
training log, analyses and the report.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from pydantic import BaseModel, ConfigDict

from pipeline.config import Preset
from pipeline.live import LiveChunks, PromptChunks
from pipeline.memory import Needs, density_bytes, harvest_needs, state_bytes, training_needs, weight_bytes
from pipeline.statistics import Moments
from pipeline.windows import file_names
from storage.batches import ShuffledBatches
from storage.encoding import Encoding, row_bytes
from storage.errors import InputError
from storage.manifest import FORMAT_VERSION
from storage.order import BatchOrder
from storage.shards import Layout, prompt_order
from storage.shuffle import window_places
from storage.zarr_files import group_metadata

_TOKEN_BYTES, _PROMPT_BYTES = 4, 6  # of a tokens artifact: int32; source int16 and document int32
_CHECKPOINTS = 3  # the newest two, and the one being written
_MANIFEST_AND_RUN = 2


class Figures(BaseModel):
    """Frozen figures that print as JSON and read back."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Site(Figures):
    """Where activations are taken."""

    hook_name: str
    """TransformerLens's name."""
    d_in: int
    """Width there."""


class TokensPlan(Figures):
    """The tokens artifact."""

    train_prompts: int
    """Training prompts."""
    train_tokens: int
    """Their tokens, BOS included."""
    bytes: int
    """Size of both splits' prompts."""
    exact: bool = False
    """Whether they were counted in the artifact; else they are what the preset asks for, an upper bound."""


class StorePlan(Figures):
    """The activations artifact of one site."""

    site: Site
    """What is harvested."""
    encoding: Encoding
    """How rows are stored."""
    windows: int
    """Windows harvested."""
    window_prompts: int
    """Prompts a window, and rows a shard."""
    rows: int
    """Rows."""
    row_bytes: int
    """Bytes of a row's codes and scale."""
    shards: int
    """Files of activations."""
    files: int
    """All files, manifest and run record included."""
    bytes: int
    """Size of all files, manifest and run record aside."""
    prompts_left_out: int
    """Training prompts that no window holds."""
    tokens_left_out: int
    """Tokens of these."""


class TrainingPlan(Figures):
    """The train artifact."""

    source: str
    """Where its batches come from: the store, or live."""
    steps: int
    """Steps."""
    passes: float
    """How often each row of the source is seen."""
    bytes: int
    """Size of the artifact, its log aside."""
    working_bytes: int
    """The most that lies on the disk while it trains, checkpoints included."""


class RunPlan(Figures):
    """One run of a preset."""

    tokens: TokensPlan
    """Documents to prompts."""
    stores: tuple[StorePlan, ...]
    """Prompts to shards, an artifact a site; the first is trained on."""
    training: TrainingPlan
    """Shards to an autoencoder."""
    made: tuple[str, ...] = ()
    """Stages whose artifacts are there already: they need no disk and no time."""

    @property
    def bytes_by_stage(self) -> dict[str, int]:
        """The most that each stage adds to the disk, made or not."""
        return {
            "tokenize": self.tokens.bytes,
            "harvest": sum(store.bytes for store in self.stores),
            "train": self.training.working_bytes,
        }

    @property
    def disk_bytes(self) -> int:
        """The most that the stages not yet made add to the disk."""
        return sum(n_bytes for stage, n_bytes in self.bytes_by_stage.items() if stage not in self.made)


@dataclass(frozen=True)
class Subject:
    """What is planned.

    Attributes:
        preset: the run's config.
        sites: the sites harvested in one pass; the first is trained on.
        tokens: the tokens artifact, if it is there already; what the preset asks for otherwise.
        made: stages whose artifacts are there already.
    """

    preset: Preset
    sites: tuple[Site, ...]
    tokens: TokensPlan | None = None
    made: tuple[str, ...] = ()

    def changed(self, **stages: Mapping[str, Any]) -> "Subject":
        """The same with other fields of some stages, as ``harvest={"encoding": "uint8"}``: not made yet, so planned."""
        changed = {name: getattr(self.preset, name).model_copy(update=fields) for name, fields in stages.items()}
        made = tuple(stage for stage in self.made if stage == "tokenize")
        return replace(self, preset=self.preset.model_copy(update=changed), made=made)

    def at(self, site: Site) -> "Subject":
        """The same at one site alone."""
        return replace(self.changed(harvest={"hook_name": site.hook_name, "also_hook_names": ()}), sites=(site,))

    def scaled(self, tokens: int) -> "Subject":
        """The same on another number of tokens: all whole windows of them, and as many passes over the rows."""
        larger = replace(
            self.changed(tokenize={"train_tokens": tokens}, harvest={"n_windows": None}, train={"source": "store"}),
            tokens=None,
            made=(),
        )
        sae = self.preset.train.autoencoder
        steps = max(1, round(self._passes * larger.layouts[0].n_rows / sae.batch_rows))
        return larger.changed(train={"autoencoder": sae.model_copy(update={"steps": steps})})

    @cached_property
    def prompts(self) -> TokensPlan:
        """The tokens, as far as they are known."""
        if self.tokens is not None:
            return self.tokens
        config = self.preset.tokenize
        length = config.prompt_tokens
        prompts, held_out = config.train_tokens // length, config.held_out_tokens // length
        n_bytes = (prompts + held_out) * (_TOKEN_BYTES * length + _PROMPT_BYTES)
        return TokensPlan(train_prompts=prompts, train_tokens=prompts * length, bytes=n_bytes)

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """The layout of each site's store.

        Raises:
            InputError: the prompts do not fill one window, or not those asked for.
        """
        config, prompts = self.preset.harvest, self.prompts.train_prompts
        whole = prompts // config.window_prompts
        wanted = config.n_windows or whole
        if not 0 < wanted <= whole:
            raise InputError(
                "too few training prompts",
                found=f"{prompts:,} prompts, {whole} whole windows",
                expected=f"{max(wanted, 1)} windows of {config.window_prompts:,} prompts",
                remedy="tokenize more, or take smaller or fewer windows (harvest.window_prompts, harvest.n_windows)",
            )
        return tuple(
            Layout(
                n_windows=wanted,
                window_prompts=config.window_prompts,
                first_position=config.first_position,
                positions=self.preset.tokenize.prompt_tokens - config.first_position,
                d_in=site.d_in,
                chunk_rows=config.chunk_rows,
                encoding=config.encoding,
                seed=config.seed,
                n_prompts=prompts,
            )
            for site in self.sites
        )

    @property
    def order(self) -> BatchOrder:
        """The order in which training reads."""
        train = self.preset.train
        return BatchOrder(
            seed=train.reader_seed,
            batch_rows=train.autoencoder.batch_rows,
            pool_rows=train.pool_rows,
            lanes=train.lanes,
        )

    def batches(self) -> ShuffledBatches:
        """What training reads from: counts its memory and, by prompt numbers alone, its mixing."""
        layout = self.layouts[0]
        if self.preset.train.source == "store":
            return planned_batches(layout)
        return LiveChunks(self.live_chunks(), _not_computed, d_in=layout.d_in, encoding=layout.encoding).batches()

    def live_chunks(self, n_prompts: int | None = None) -> PromptChunks:
        """The model batches of training without a store, over all prompts or the first ``n_prompts``."""
        layout = self.layouts[0]
        return PromptChunks(
            n_prompts=self.prompts.train_prompts if n_prompts is None else n_prompts,
            model_batch_prompts=self.preset.harvest.model_batch_prompts,
            positions=layout.positions,
            first_position=layout.first_position,
            seed=layout.seed,
        )

    def plan(self) -> RunPlan:
        """The sizes of the run."""
        stores = tuple(
            _store_plan(layout, site, self.preset.tokenize.prompt_tokens)
            for layout, site in zip(self.layouts, self.sites, strict=True)
        )
        return RunPlan(tokens=self.prompts, stores=stores, training=self._training(), made=self.made)

    def memory_needs(self, *, model_width: int, d_vocab: int, workers: int) -> dict[str, dict[str, int]]:
        """What harvest and training take beside the process with its model, by stage and part.

        Args:
            model_width: the widest activation of the model on the way to the hooks.
            d_vocab: of the model.
            workers: forward passes at once.
        """
        config, layout = self.preset.harvest, self.layouts[0]
        harvest: Needs = harvest_needs(
            self.layouts, model_batch_prompts=config.model_batch_prompts, model_width=model_width, workers=workers
        )
        train: Needs = training_needs(
            self.preset.train,
            d_in=layout.d_in,
            pool_bytes=self.batches().pool_bytes(self.order),
            row_bytes=row_bytes(layout.encoding, layout.d_in),
            prompt_tokens=self.preset.tokenize.prompt_tokens,
            d_vocab=d_vocab,
        )
        return {"harvest": dict(harvest), "train": dict(train)}

    @property
    def _passes(self) -> float:
        sae, layout = self.preset.train.autoencoder, self.layouts[0]
        rows = layout.n_rows
        if self.preset.train.source == "live":
            size = self.preset.harvest.model_batch_prompts
            rows = self.prompts.train_prompts // size * size * layout.positions
        return sae.steps * sae.batch_rows / rows

    def _training(self) -> TrainingPlan:
        train, d_in = self.preset.train, self.layouts[0].d_in
        densities = density_bytes(train)
        kept = weight_bytes(train, d_in) + densities
        return TrainingPlan(
            source=train.source,
            steps=train.autoencoder.steps,
            passes=self._passes,
            bytes=kept,
            working_bytes=_CHECKPOINTS * (state_bytes(train, d_in) + densities) + kept,
        )


class PlannedChunks:
    """The chunks of a store that is not there: their formats, and their rows' prompt numbers.

    Args:
        layout: of the store.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.arrays = layout.arrays()
        self._windows: dict[int, npt.NDArray[np.int32]] = {}

    def load(self, chunk: int, out: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Writes the prompt numbers of a chunk's rows; see ``storage.pool.ChunkSource``."""
        window, inner = divmod(chunk, self.layout.window_rows // self.layout.chunk_rows)
        if window not in self._windows:  # two threads may both make it: alike
            self._windows[window] = self._window(window)
        out["prompt"][:] = self._windows[window][inner]

    def _window(self, window: int) -> npt.NDArray[np.int32]:
        layout, size = self.layout, self.layout.window_prompts
        prompts = self._order[window * size : (window + 1) * size]
        rows = np.empty(layout.window_rows, np.int32)
        rows[window_places(layout.seed, window, size, layout.positions)] = prompts[:, None]
        return rows.reshape(-1, layout.chunk_rows)

    @cached_property
    def _order(self) -> npt.NDArray[np.int64]:
        return prompt_order(self.layout.seed, self.layout.n_prompts)


def planned_batches(layout: Layout) -> ShuffledBatches:
    """What the reader of a store of this layout reads from, without the store."""
    return ShuffledBatches(
        PlannedChunks(layout),
        n_chunks=layout.n_chunks,
        chunk_rows=layout.chunk_rows,
        positions=layout.positions,
        encoding=layout.encoding,
    )


def _store_plan(layout: Layout, site: Site, prompt_tokens: int) -> StorePlan:
    attributes: dict[str, Any] = {"sparsemill": {"format_version": FORMAT_VERSION, "layout": layout.to_json()}}
    metadata = [group_metadata(attributes), *(array.metadata() for array in layout.arrays().values())]
    statistics_bytes = (layout.n_windows + 1) * _statistics_bytes(layout.d_in)
    left_out = layout.n_prompts - layout.n_windows * layout.window_prompts
    return StorePlan(
        site=site,
        encoding=layout.encoding,
        windows=layout.n_windows,
        window_prompts=layout.window_prompts,
        rows=layout.n_rows,
        row_bytes=row_bytes(layout.encoding, layout.d_in),
        shards=layout.n_shards,
        files=layout.n_windows * len(file_names(layout, 0)) + len(metadata) + 1 + _MANIFEST_AND_RUN,
        bytes=layout.bytes + sum(map(len, metadata)) + statistics_bytes,
        prompts_left_out=left_out,
        tokens_left_out=left_out * prompt_tokens,
    )


def _statistics_bytes(d_in: int) -> int:
    """Size of a file of statistics: each array grows with d_in to the power of its dimensions."""
    arrays = Moments.empty(1).to_arrays()
    header = len(safetensors.numpy.save(arrays)) - sum(array.nbytes for array in arrays.values())
    return header + sum(array.itemsize * d_in**array.ndim for array in arrays.values())


def _not_computed(prompts: npt.NDArray[np.int32]) -> NoReturn:
    raise NotImplementedError(f"a plan computes no activations ({len(prompts)} prompts were asked for)")
