"""Counts of a device's memory against what the engines hold, on the CPU: their shapes are the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import load_preset
from pipeline.planning.device import device_needs, device_room_bytes, host_needs, require_device_room
from pipeline.planning.sizes import Site, Subject
from sae.kernels.dense import DenseEngine
from sae.kernels.interface import Objective, Weights
from storage.errors import MemoryBudgetExceeded

ROWS, D_IN, D_SAE = 256, 24, 512


def subject(preset: Path, train: dict[str, Any] | None = None, **sae: Any) -> Subject:
    loaded = load_preset(str(preset))
    settings = {"d_sae": D_SAE, "batch_rows": ROWS, "engine": "dense"} | sae
    autoencoder = loaded.train.autoencoder.model_copy(update=settings)
    one = Subject(loaded, (Site(hook_name="blocks.0.mlp.hook_post", d_in=D_IN),))
    return one.changed(train={"autoencoder": autoencoder} | (train or {}))


def step_bytes(preset: Path, **sae: Any) -> int:
    return device_needs(subject(preset, **sae), model_width=96)["train"]["a step"]


def test_a_dense_step_holds_what_is_counted_for_it(tiny_preset: Path):
    weights = Weights(torch.randn(D_SAE, D_IN), torch.zeros(D_SAE), torch.randn(D_SAE, D_IN), torch.zeros(D_IN))
    engine, rows = DenseEngine(), torch.randn(ROWS, D_IN)
    grads, _ = engine.gradients(weights, rows, Objective(torch.zeros(D_IN), 0.1))
    held = sum(tensor.nbytes for tensor in (*engine._memory.values(), *grads))
    sae_in_error_and_bias = 3 * rows.nbytes
    projecting = 3 * weights.dec.nbytes
    assert step_bytes(tiny_preset) == held + sae_in_error_and_bias + projecting


def test_a_sparse_step_at_the_posts_size_has_the_lists_of_the_traffic_table(tiny_preset: Path):
    posts = {"engine": "sparse", "d_sae": 16_384, "batch_rows": 4096}
    lists = 3 * 4096 * 16_384  # bytes: docs/training-cuda.md
    copies_and_norms = 16_384 * (2 * D_IN + 16)
    products = 2 * 4096 * 16_384
    least = lists + copies_and_norms + products
    assert least < step_bytes(tiny_preset, **posts) < 2 * least
    wider = step_bytes(tiny_preset, **posts | {"gradient_clip_norm": 1.0}) - step_bytes(tiny_preset, **posts)
    assert wider >= 4 * 2 * 16_384 * D_IN  # gradients are written out


def test_products_of_the_screen_come_in_parts_of_the_size_counted():
    triton_screen = pytest.importorskip("sae.kernels.triton_screen")
    from pipeline.planning import device

    assert device._PRODUCT_BYTES == 2 * triton_screen.PRODUCT_BYTES


def test_a_run_that_begins_with_dense_steps_keeps_their_memory_beside_the_sparse_ones(tiny_preset: Path):
    dense, sparse = (step_bytes(tiny_preset, engine=engine) for engine in ("dense", "sparse"))
    zero = {"b_enc_init": "zero", "target_l0": None}
    calibrated = {"b_enc_init": "calibrated", "target_l0": 4.0}
    assert step_bytes(tiny_preset, engine="auto", **zero) == dense + sparse
    assert step_bytes(tiny_preset, engine="auto", **calibrated) == sparse


def test_what_lies_on_the_device_is_not_counted_on_the_host(tiny_preset: Path):
    one = subject(tiny_preset)
    host = one.memory_needs(model_width=96, d_vocab=64, workers=1)
    left = host_needs(host, device_needs(one, model_width=96))
    assert set(host["harvest"]) - set(left["harvest"]) == {"model batches"}
    assert {"weights and Adam's moments", "a step"} < set(host["train"]) - set(left["train"])
    assert {"batches", "shuffling pools", "a checkpoint being written"} < set(left["train"])
    assert host_needs(host, {}) == host


def test_a_live_source_runs_its_model_there_too(tiny_preset: Path):
    store, live = (
        device_needs(subject(tiny_preset, {"source": source}), model_width=96)["train"] for source in ("store", "live")
    )
    assert set(live) - set(store) == {"model batches"}


def test_a_run_too_large_for_the_device_is_refused_by_stage(tiny_preset: Path):
    one = subject(tiny_preset)
    needs = device_needs(one, model_width=96)
    room = max(sum(parts.values()) for parts in needs.values())
    require_device_room(one, needs, room)
    with pytest.raises(MemoryBudgetExceeded, match=r"train does not fit the device.*a smaller train") as error:
        require_device_room(one, needs, sum(needs["train"].values()) - 1)
    assert error.value.kind == "memory"
    with pytest.raises(MemoryBudgetExceeded, match=r"harvest does not fit .* smaller harvest\.model_batch_prompts"):
        require_device_room(one, needs, 0)
    require_device_room(Subject(one.preset, one.sites, None, ("tokenize", "harvest", "train")), needs, 0)


def test_only_a_cuda_device_has_memory_of_its_own():
    assert device_room_bytes(torch.device("cpu")) is None
