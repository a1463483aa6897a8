"""What a run holds in the memory of a CUDA device, and whether it fits: counted from shapes, like the host's.

Weights, moments and what a step allocates lie on the device instead of the host; the model that evaluates lies on the
host, beside the reader's pools. What is in no shape (torch's context, work spaces of libraries) is taken already when
the free memory is read, except for what fragments. No device was at hand to compare these counts with.
"""

from collections.abc import Mapping

import torch

from pipeline.config import TrainConfig
from pipeline.memory import START_ROWS, Needs, described, harvest_needs, size, state_bytes, weight_bytes
from pipeline.planning.sizes import Subject
from sae.initialisation import FEATURE_BLOCK
from storage.errors import MemoryBudgetExceeded

_HARVEST_STREAMS = 2  # forward passes at once on a device
_BATCHES = 2  # one in use, and one whose copy is on its way
_PRODUCT_BYTES = 2 * 2**28  # the screen's products: one part, and the next
_ENTRY_BYTES, _ENTRY_SHARE = 32, 0.05  # an active entry, regrouped by feature; the share of d_sae `auto` allows


def device_needs(subject: Subject, *, model_width: int) -> dict[str, dict[str, int]]:
    """What harvest and training take of a device's memory beside the model, by stage and part.

    Args:
        subject: what is planned.
        model_width: the widest activation of the model on the way to the hooks.
    """
    preset, layouts = subject.preset, subject.layouts
    harvest = harvest_needs(
        layouts, model_batch_prompts=preset.harvest.model_batch_prompts, model_width=model_width,
        workers=_HARVEST_STREAMS,
    )  # fmt: skip
    passes = {"model batches": harvest["model batches"]}
    moments = 4 * _HARVEST_STREAMS * sum(layout.d_in**2 for layout in layouts)
    return {
        "harvest": {**passes, "second moments": moments},
        "train": {
            **_training_needs(preset.train, layouts[0].d_in),
            **(passes if preset.train.source == "live" else {}),
        },
    }


def host_needs(
    host: Mapping[str, Mapping[str, int]], device: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """What is left for the host of needs that were counted for it alone; batches pass through both."""
    return {
        stage: {name: part for name, part in parts.items() if name == "batches" or name not in device.get(stage, {})}
        for stage, parts in host.items()
    }


def device_room_bytes(device: torch.device) -> int | None:
    """What a stage may take of a CUDA device's memory beside what is there; None for other devices."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def require_device_room(subject: Subject, needs: Mapping[str, Mapping[str, int]], room_bytes: int) -> None:
    """Refuses a run of which a stage does not fit the device.

    Args:
        subject: what is planned.
        needs: see :func:`device_needs`.
        room_bytes: see :func:`device_room_bytes`.

    Raises:
        MemoryBudgetExceeded: a stage not yet made needs more.
    """
    ways = {
        "harvest": "a smaller harvest.model_batch_prompts",
        "train": "a smaller train.autoencoder.batch_rows, a smaller train.autoencoder.d_sae",
    }
    for stage, parts in needs.items():
        if stage not in subject.made and sum(parts.values()) > room_bytes:
            raise MemoryBudgetExceeded(
                f"{stage} does not fit the device's memory", found=f"{size(room_bytes)} for it",
                expected=described(parts), remedy=f"choose: {ways[stage]}, or another device",
            )  # fmt: skip


def _training_needs(config: TrainConfig, d_in: int) -> Needs:
    sae = config.autoencoder
    # Copies of the state are made there before they are brought to the host.
    copies = {"a checkpoint's copies": state_bytes(config, d_in), "a step": _step_bytes(config, d_in)}
    later = {"batches": _BATCHES * sae.batch_rows * (4 * d_in + 8), **copies}
    # Given back before what comes later is taken: the sample, centred or in float64 twice, and calibration's products.
    sample = START_ROWS * d_in * (20 if sae.b_dec_init == "geometric-median" else 8)
    start = sample + (4 * FEATURE_BLOCK * START_ROWS if sae.target_l0 else 0)
    return {
        **later,
        "starting sample, beyond these": max(0, start - sum(later.values())),
        "weights and Adam's moments": state_bytes(config, d_in),
    }


def _step_bytes(config: TrainConfig, d_in: int) -> int:
    """Of the engines that the settings may take: what the dense one allocates is kept when the sparse one follows."""
    sae = config.autoencoder
    sparse_alone = sae.engine == "sparse" or (sae.engine == "auto" and sae.b_enc_init == "calibrated")
    sparse = 0 if sae.engine == "dense" else _sparse_step_bytes(config, d_in)
    return sparse if sparse_alone else sparse + _dense_step_bytes(config, d_in)


def _sparse_step_bytes(config: TrainConfig, d_in: int) -> int:
    rows, d_sae = config.autoencoder.batch_rows, config.autoencoder.d_sae
    capacity = min(d_sae, max(128, d_sae // 4))
    view = d_sae * (2 * d_in + 16)
    inputs_and_error = rows * (10 * d_in + 40)
    products = min(_PRODUCT_BYTES, 2 * rows * d_sae)
    lists = 12 * rows * capacity
    entries = round(_ENTRY_BYTES * _ENTRY_SHARE * rows * d_sae)
    bias_parts = 4 * d_in * -(-d_sae // 8)
    gradients = 0 if config.autoencoder.gradient_clip_norm is None else weight_bytes(config, d_in) + 12 * d_in * d_sae
    return view + inputs_and_error + products + lists + entries + bias_parts + gradients


def _dense_step_bytes(config: TrainConfig, d_in: int) -> int:
    """Three arrays of features, gradients, and three of the decoder's shape while its gradient is projected."""
    rows, d_sae = config.autoencoder.batch_rows, config.autoencoder.d_sae
    rounded = 4 * d_sae * (rows + d_in) if config.autoencoder.precision == "bfloat16" else 0
    return 12 * rows * (d_sae + d_in) + weight_bytes(config, d_in) + 12 * d_in * d_sae + rounded
