"""What the stages hold in memory, and whether it fits: counted from shapes before any work, never by trying.

A memory budget never changes content: a stage that does not fit is refused, with the setting that would fit. What is
counted is what grows with the settings; libraries and the language model are in the process already when a stage asks,
so they are measured (``resident_bytes``). Rejected: letting the kernel decide (a killed process says nothing), and
shrinking windows or pools on the spot (both are identity: other windows are other bytes).
"""

import os
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from pipeline.config import TrainConfig
from pipeline.evaluation import MICRO_BATCH_PROMPTS
from pipeline.language_model import LanguageModel
from sae.initialisation import FEATURE_BLOCK
from sae.kernels.screen import ROW_BLOCK
from storage.errors import MemoryBudgetExceeded
from storage.shards import Layout

Needs: TypeAlias = Mapping[str, int]
"""Bytes by what they are for."""

_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")
_WINDOWS = {1: "one window", 2: "two windows"}  # one is computed while another is written, if two are held
_PLACE_BYTES = 8  # a row's place in its window, kept with the window's buffer
_SHUFFLE_BYTES = 24  # a row, while a window's places are being drawn
_ALIVE = 8  # activations of the model's width a pass, as measured: those in use, and what allocators keep of freed ones
_BATCHES = 4  # one in use, one being made, two prefetched
_LOGITS = 4  # copies of an evaluation's logits at once
_KERNEL_BYTES = 128 * 2**20  # numba, its compiler and its code, measured
START_ROWS = 32_768
"""Rows of the store that a training starts from."""


def available_bytes() -> int:
    """Memory that this process may still take: the machine's, or what is left of its container's limit."""
    left = _cgroup_left()
    machine = _machine_available()
    return machine if left is None else min(machine, left)


def resident_bytes() -> int:
    """Memory that this process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the most that it has held
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def model_width(model: LanguageModel) -> int:
    """The widest activation of a model on the way to a hook: the MLP's, inside."""
    config = model.bridge.cfg
    return int(getattr(config, "d_mlp", None) or 4 * config.d_model)


def harvest_needs(
    layouts: Sequence[Layout], *, model_batch_prompts: int, model_width: int, workers: int, windows: int = 2
) -> Needs:
    """What a harvest takes beside its process and its model.

    Args:
        layouts: of the stores written in one pass.
        model_batch_prompts: prompts a forward pass.
        model_width: see the function of this name.
        workers: forward passes at once.
        windows: held at once: 2, or 1 on a worker of a cluster.
    """
    prompt_tokens = max(layout.first_position + layout.positions for layout in layouts)
    batch_tokens = model_batch_prompts * prompt_tokens
    rows, squares = layouts[0].window_rows, sum(layout.d_in**2 for layout in layouts)
    buffers = sum(layout.window_buffer_bytes + _PLACE_BYTES * layout.window_rows for layout in layouts)
    return {
        _WINDOWS[windows]: windows * buffers + _SHUFFLE_BYTES * rows,
        "model batches": _ALIVE * 4 * workers * batch_tokens * model_width,
        "statistics": (windows + 1) * 8 * squares + 4 * workers * squares,
        "order of the prompts": 2 * 8 * layouts[0].n_prompts,
        "compiled kernels": _KERNEL_BYTES,
    }


def training_needs(
    config: TrainConfig, *, d_in: int, pool_bytes: int, row_bytes: int, prompt_tokens: int, d_vocab: int
) -> Needs:
    """What a training takes beside its process and the model that evaluates it.

    Args:
        config: of the stage.
        d_in: width of the activations.
        pool_bytes: of the reader's pools.
        row_bytes: of a stored row.
        prompt_tokens: of the prompts that it is evaluated on.
        d_vocab: of the model.
    """
    sae = config.autoencoder
    later = {
        "shuffling pools": pool_bytes,
        "batches": 4 * _BATCHES * sae.batch_rows * d_in,
        # The state and the densities so far are copied, then laid out as a file's bytes.
        "a checkpoint being written": 2 * (state_bytes(config, d_in) + density_bytes(config)),
    }
    # Given back before what comes later is taken: counts where it is more.
    start = START_ROWS * (8 * d_in + row_bytes) + (4 * FEATURE_BLOCK * START_ROWS if sae.target_l0 else 0)
    return {
        **later,
        "starting sample, beyond these": max(0, start - sum(later.values())),
        "weights and Adam's moments": state_bytes(config, d_in),
        "densities of features": density_bytes(config),
        "a step": _step_bytes(config, d_in),
        "evaluation": _LOGITS * 4 * MICRO_BATCH_PROMPTS * prompt_tokens * d_vocab,
        "compiled kernels": 0 if sae.engine == "dense" else _KERNEL_BYTES,
    }


def weight_bytes(config: TrainConfig, d_in: int) -> int:
    """Size of an autoencoder: W_enc, b_enc, W_dec, b_dec in float32."""
    d_sae = config.autoencoder.d_sae
    return 4 * (2 * d_in * d_sae + d_sae + d_in)


def state_bytes(config: TrainConfig, d_in: int) -> int:
    """Size of a trainer's state, in memory and in a checkpoint: weights, two moments, counts, and resampled inputs."""
    d_sae = config.autoencoder.d_sae
    candidates = 4 * d_in * d_sae if config.autoencoder.resampling.scheme == "anthropic" else 0
    return 3 * weight_bytes(config, d_in) + 4 * d_in + 3 * 8 * d_sae + candidates


def density_bytes(config: TrainConfig) -> int:
    """Size of a training's firing counts, int64, of all its windows: gathered in memory, and in every checkpoint."""
    sae = config.autoencoder
    return sae.steps * sae.batch_rows // sae.density_window_rows * 8 * sae.d_sae


def require_memory(
    layouts: Sequence[Layout],
    *,
    model_batch_prompts: int,
    model_width: int,
    workers: int,
    windows: int = 2,
    budget_bytes: int | None = None,
    where: str | None = None,
) -> None:
    """Checks, before a harvest begins and with its model loaded, that it fits the memory.

    Args:
        layouts: see :func:`harvest_needs`, as for the next four.
        model_batch_prompts: prompts a forward pass.
        model_width: see the function of this name.
        workers: forward passes at once.
        windows: held at once.
        budget_bytes: what this process may hold in all; what the machine has left by default.
        where: the worker that this is, of a cluster.

    Raises:
        MemoryBudgetExceeded: it does not; names the ``window_prompts`` that does.
    """
    needs = harvest_needs(
        layouts, model_batch_prompts=model_batch_prompts, model_width=model_width, workers=workers, windows=windows
    )
    room = room_bytes(budget_bytes)
    if sum(needs.values()) > room:
        raise MemoryBudgetExceeded(
            "the harvest does not fit the memory",
            where=where,
            found=f"{size(room)} for it",
            expected=described(needs),
            remedy=f"choose one of: {'; '.join(smaller_windows(layouts, needs, room))}",
        )


def encoder_needs(*, d_in: int, d_sae: int, threads: int, batch_rows: int) -> Needs:
    """What encoding rows takes beside its process, but for what is found: 8 bytes a firing.

    Args:
        d_in: width of the activations.
        d_sae: number of features.
        threads: that encode.
        batch_rows: rows encoded at once.
    """
    return {
        "the autoencoder, and its file as it is read": 2 * 8 * d_in * d_sae,
        "its encoder": 6 * d_in * d_sae,  # rows of features in float32, and rounded
        "screens": 8 * threads * ROW_BLOCK * d_sae,
        "batches": 4 * _BATCHES * batch_rows * d_in,
        "compiled kernels": _KERNEL_BYTES,
    }


def require_encoder_memory(needs: Needs, *, budget_bytes: int | None, where: str) -> None:
    """Checks that a worker of a cluster has room to encode.

    Args:
        needs: see :func:`encoder_needs`.
        budget_bytes: what its process may hold in all; what its machine has left by default.
        where: the worker.

    Raises:
        MemoryBudgetExceeded: it has not.
    """
    _require_on_worker("the encoder does not fit the memory", needs, budget_bytes=budget_bytes, where=where)


def require_pass_memory(label: str, needs: Needs, *, budget_bytes: int | None, where: str) -> None:
    """Checks that a worker of a cluster has room for a pass of an analysis; for arguments see above.

    Raises:
        MemoryBudgetExceeded: it has not.
    """
    _require_on_worker(f"{label} does not fit the memory", needs, budget_bytes=budget_bytes, where=where)


def _require_on_worker(what: str, needs: Needs, *, budget_bytes: int | None, where: str) -> None:
    room = room_bytes(budget_bytes)
    if sum(needs.values()) > room:
        raise MemoryBudgetExceeded(
            what, where=where, found=f"{size(room)} for it", expected=described(needs),
            remedy="give workers more memory each, by starting fewer, or fewer threads",
        )  # fmt: skip


def room_bytes(budget_bytes: int | None) -> int:
    """What a stage that begins now may take: the rest of a budget for the whole process, or what is available."""
    return available_bytes() if budget_bytes is None else max(0, budget_bytes - resident_bytes())


def smaller_windows(layouts: Sequence[Layout], needs: Needs, room: int) -> list[str]:
    """Settings under which a harvest would fit, with what each needs."""
    layout = layouts[0]
    windows = next(iter(needs.values()))  # the windows come first
    a_prompt = windows / layout.window_prompts
    rest = sum(needs.values()) - windows
    prompts = int((room - rest) / a_prompt) // layout.chunk_rows * layout.chunk_rows
    choices = [
        f"harvest.window_prompts={prompts} ({size(rest + round(prompts * a_prompt))})"
        if prompts >= layout.chunk_rows
        else f"no window of whole chunks of {layout.chunk_rows} prompts fits"
    ]
    if any(layout.encoding != "uint8" for layout in layouts):
        choices.append("harvest.encoding=uint8, which halves or quarters a window")
    return choices


def described(needs: Needs) -> str:
    """The sum, and its parts, for a message."""
    return f"{size(sum(needs.values()))} ({', '.join(f'{name} {size(part)}' for name, part in needs.items())})"


def size(n_bytes: float) -> str:
    """A size for people: MiB, GiB or TiB."""
    for unit, name in ((2**40, "TiB"), (_GIB, "GiB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:,.2f} {name}"
    return f"{n_bytes / 2**20:,.1f} MiB"


def _step_bytes(config: TrainConfig, d_in: int) -> int:
    sae = config.autoencoder
    if sae.engine == "sparse" or (sae.engine == "auto" and sae.b_enc_init == "calibrated"):
        # A bfloat16 copy of the encoder, three arrays of the batch's rows, and active entries (a hundredth of d_sae).
        return 2 * d_in * sae.d_sae + 3 * 4 * sae.batch_rows * d_in + 12 * sae.batch_rows * sae.d_sae // 100
    # The dense step keeps three arrays of features, and makes gradients of every weight.
    return weight_bytes(config, d_in) + 4 * sae.batch_rows * (3 * sae.d_sae + 3 * d_in)


def _machine_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_left() -> int | None:
    """What is left below a container's limit, pages of files that the kernel would give back counted as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stats = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(stats.get("inactive_file", 0)))
