"""The harvest stage: prompts -> exactly shuffled Zarr shards of activations, a window at a time.

Windows are computed in this process or on a cluster (``pipeline.window_work``). A window depends on the series (the
spec without the number of windows) and its index alone, and model batches never straddle windows. So a killed harvest
computes again only what its journal lacks; a longer or shorter harvest of a series links the windows that another one
has; and a damaged window can be made again by itself. All end with the same bytes: statistics, too, are kept per window
and folded in the windows' order.

Sites harvested in one pass are artifacts of their own, each with the id and the bytes that it has when harvested alone.
Rejected: one artifact of several arrays (its id would depend on which sites were asked for together).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from pipeline import language_model
from pipeline.config import HarvestConfig, validate
from pipeline.language_model import LanguageModel
from pipeline.memory import model_width, require_memory
from pipeline.statistics import Moments
from pipeline.tokens import TokenTable
from pipeline.window_work import THREADS, WindowWork, compute_here, compute_on_cluster, harvester_of
from pipeline.windows import file_names, statistics_name, unit_name
from pipeline.workspace import Workspace, facts, require_version
from storage import atomic
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.certificate import certify
from storage.errors import InputError, NumericsError, SparsemillError
from storage.fingerprint import Json
from storage.order import MIN_POOL_CHUNKS
from storage.reader import BatchOrder, ShardReader
from storage.shards import Layout, create_group

OUTPUT_VERSION = 2
STATISTICS = "statistics.safetensors"

_LANES = 8
_CERTIFIED_BATCH_ROWS = 4096


def harvest(config: HarvestConfig, tokens: Artifact, workspace: Workspace) -> Made:
    """Makes, or finds, the activations of a tokens artifact at the config's site, and at its further sites if any.

    Returns:
        The artifact of ``config.hook_name``; those of ``config.also_hook_names`` are found by a config that names them.

    Raises:
        UnknownHook: the model has no such hook.
        InputError: the tokens do not fill one window, or are not the model's.
        MemoryBudgetExceeded: two windows do not fit the memory, or one a worker's; the window that does is named.
        StorageFull: the planned store does not fit the disk; nothing was computed.
        NumericsError: a value is not finite or overflows the encoding; its prompt is named.
    """
    settings: dict[str, Json] = {
        **config.model_dump(mode="json", exclude={"language_model", "also_hook_names"}),
        "n_windows": _windows(config, tokens),
        "model": language_model.identity(config.language_model),
    }
    hook_names = list(dict.fromkeys([config.hook_name, *config.also_hook_names]))
    specs = [
        Spec("harvest", OUTPUT_VERSION, {**settings, "hook_name": name}, {"tokens": tokens.as_parent()})
        for name in hook_names
    ]
    work = _Harvesting(config, tokens, workspace)
    made = workspace.make_together(specs, work.produce, provenance=workspace.provenance(threads=THREADS))
    for name, other in zip(hook_names[1:], made[1:], strict=True):
        workspace.reporter.say(f"  {name}: {other.artifact.id} {other.status}")
    return made[0]


def mean_activation(activations: Artifact) -> npt.NDArray[np.float32]:
    """Mean of each neuron over the whole artifact, (d_in,)."""
    return moments(activations).mean.astype(np.float32)


def moments(activations: Artifact) -> Moments:
    """The artifact's per-neuron statistics."""
    return _load_moments(activations.checked_file(STATISTICS))


def recorded_config(activations: Artifact) -> HarvestConfig:
    """The config that a harvest was made with.

    Raises:
        UnsupportedFormat: the harvest is of another output version.
    """
    require_version(activations, OUTPUT_VERSION)
    values = {name: value for name, value in activations.config.items() if name in HarvestConfig.model_fields}
    return validate(
        HarvestConfig, values | {"language_model": activations.stats["language_model"]}, where=activations.id
    )


def recorded_layout(activations: Artifact) -> Layout:
    """The shape of a harvest's store, from its manifest alone."""
    config, figures = recorded_config(activations), facts(activations)
    return Layout(
        n_windows=figures["windows"],
        window_prompts=config.window_prompts,
        first_position=config.first_position,
        positions=figures["positions"],
        d_in=figures["d_in"],
        chunk_rows=config.chunk_rows,
        encoding=config.encoding,
        seed=config.seed,
        n_prompts=figures["windows"] * config.window_prompts + figures["prompts_left_out"],
    )


def write_window_files(activations: Artifact, windows: Sequence[int], folder: Path, workspace: Workspace) -> list[str]:
    """Computes windows of a committed harvest again, from its recorded config and its parent.

    Args:
        activations: the harvest.
        windows: numbers of the windows.
        folder: where their files are written, under the names that they have in the artifact.
        workspace: whose store holds the parent.

    Returns:
        Names of the files written. Their bytes are the artifact's if the numerics are (the manifest's ``provenance``).

    Raises:
        ArtifactNotFound: the parent is not there.
        ConfigError: the model has other weights now.
        UnsupportedFormat: the harvest is of another output version.
    """
    config, layout = recorded_config(activations), recorded_layout(activations)
    table = TokenTable(workspace.store.parent(activations, "tokens"))
    model = language_model.load_recorded(activations, device=workspace.runtime.device)
    names: list[str] = []
    with (
        workspace.reporter.track("recompute", len(windows) * layout.window_rows, "rows") as advance,
        harvester_of(config, model, table, {config.hook_name: layout}, workspace.threads) as harvester,
    ):
        for window in windows:
            names += harvester.compute(window, [config.hook_name], advance)[config.hook_name].write(folder)
    return names


def write_shared_files(activations: Artifact, folder: Path) -> list[str]:
    """Writes the files of a committed harvest that belong to no window: metadata, and the folded statistics.

    Args:
        activations: the harvest.
        folder: where they are written; its statistics of windows, where it has any, go before the artifact's.

    Returns:
        Names of the files written.
    """
    layout = recorded_layout(activations)
    names = [statistics_name(window) for window in range(layout.n_windows)]
    total = _fold(folder / name if (folder / name).is_file() else activations.checked_file(name) for name in names)
    atomic.make_folder(folder, durable=False)
    atomic.write_file(folder / STATISTICS, [safetensors.numpy.save(total.to_arrays())])
    return [*create_group(folder, layout), STATISTICS]


def finish(staging: Staging, layout: Layout, named: Mapping[str, Json]) -> Result:
    """Folds the statistics of a store whose windows are all there, and certifies it.

    Args:
        staging: of the harvest.
        layout: of its store.
        named: has the model's name and commit as ``language_model`` and ``language_model_commit``.

    Raises:
        NumericsError: the certificate failed.
    """
    total = _fold(staging.path(statistics_name(window)) for window in range(layout.n_windows))
    staging.write_bytes(STATISTICS, safetensors.numpy.save(total.to_arrays()))
    certificate = _certify(ShardReader(staging.folder, staging.spec.id), layout)
    kept = {name: named.get(name) for name in ("language_model", "language_model_commit")}
    return Result({**kept, **_stats(layout, total), "certificate": certificate})


@dataclass
class _Harvesting:
    """One run of the stage."""

    config: HarvestConfig
    tokens: Artifact
    workspace: Workspace

    def produce(self, stagings: Sequence[Staging]) -> list[Result]:
        """Takes over or computes the windows that the journals lack, then the statistics over all."""
        sites = {str(staging.spec.config["hook_name"]): staging for staging in stagings}
        table = TokenTable(self.tokens)
        config, device = self.config, self.workspace.runtime.device
        model = language_model.load(config.language_model, device=device, dtype=config.forward_dtype)
        for name in sites:
            model.check_hook(name)
        _check_tokens(model, table)
        layouts = self._layouts(model, table, list(sites))
        if not self.workspace.runtime.on_cluster:  # whose workers look for themselves
            require_memory(
                list(layouts.values()),
                model_batch_prompts=self.config.model_batch_prompts,
                model_width=model_width(model),
                workers=self.workspace.threads,
            )
        missing = {name: self._prepare(staging, layouts[name]) for name, staging in sites.items()}
        atomic.require_free(
            stagings[0].folder,
            sum(layout.bytes * len(missing[name]) // layout.n_windows for name, layout in layouts.items()),
        )
        self._compute(WindowWork(config, model, table, sites, layouts, missing))
        named = {"language_model": model.name, "language_model_commit": model.commit}
        return [finish(staging, layouts[name], named) for name, staging in sites.items()]

    def _layouts(self, model: LanguageModel, table: TokenTable, hook_names: Sequence[str]) -> dict[str, Layout]:
        probe = model.activations_at(table.ids("train", [0]), hook_names)
        return {
            name: Layout(
                n_windows=_windows(self.config, self.tokens),
                window_prompts=self.config.window_prompts,
                first_position=self.config.first_position,
                positions=table.prompt_tokens - self.config.first_position,
                d_in=probe[name].shape[-1],
                chunk_rows=self.config.chunk_rows,
                encoding=self.config.encoding,
                seed=self.config.seed,
                n_prompts=table.n_prompts("train"),
            )
            for name in hook_names
        }

    def _prepare(self, staging: Staging, layout: Layout) -> list[int]:
        """Writes the metadata, links what other harvests of the series have; returns the windows still missing."""
        create_group(staging.folder, layout)
        for relative in self._relatives(staging.spec):
            shared = range(min(layout.n_windows, facts(relative)["windows"]))
            taken = [
                window
                for window in shared
                if unit_name(window) not in staging.finished
                and staging.adopt(unit_name(window), file_names(layout, window), relative)
            ]
            if taken:
                self.workspace.reporter.say(f"  {len(taken)} of {layout.n_windows} windows taken from {relative.id}")
        return [window for window in range(layout.n_windows) if unit_name(window) not in staging.finished]

    def _relatives(self, spec: Spec) -> Iterator[Artifact]:
        """Harvests of the same series and the same numerics."""
        for artifact_id in self.workspace.store.ids("harvest"):
            with suppress(SparsemillError):  # a damaged one is no help here, and no hindrance
                found = self.workspace.store.open(artifact_id)
                if _series(found.spec) == _series(spec) and found.manifest.provenance == self.workspace.provenance(
                    threads=THREADS
                ):
                    yield found

    def _compute(self, work: WindowWork) -> None:
        layout, windows = next(iter(work.layouts.values())), work.wanted()
        done = (layout.n_windows - len(windows)) * layout.window_rows
        compute = compute_on_cluster if self.workspace.runtime.on_cluster else compute_here
        with self.workspace.reporter.track("harvest", layout.n_rows, "rows", start=done) as advance:
            compute(work, self.workspace, advance)


def _series(spec: Spec) -> tuple[object, ...]:
    config = {name: value for name, value in spec.config.items() if name != "n_windows"}
    return spec.version, config, spec.parents


def _fold(files: "Iterator[Path]") -> Moments:
    """The statistics of all windows, in their order."""
    first, *rest = (_load_moments(file) for file in files)
    for later in rest:
        first = first.merge(later)
    return first


def _load_moments(file: Path) -> Moments:
    return Moments.from_arrays(safetensors.numpy.load_file(file))


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


def _stats(layout: Layout, total: Moments) -> dict[str, Any]:
    return {
        "rows": layout.n_rows,
        "windows": layout.n_windows,
        "shards": layout.n_shards,
        "activation_bytes": layout.bytes,
        "d_in": layout.d_in,
        "positions": layout.positions,
        "prompts_left_out": layout.n_prompts - layout.n_windows * layout.window_prompts,
        "mean_activation_norm": float(np.linalg.norm(total.mean)),
        "second_moment_rows": total.sampled_rows,
    }
