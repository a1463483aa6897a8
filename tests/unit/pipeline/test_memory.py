import mmap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import memory
from pipeline.config import TrainConfig
from pipeline.memory import (
    available_bytes,
    require_memory,
    resident_bytes,
    state_bytes,
    training_needs,
    weight_bytes,
)
from sae.config import AnthropicResampling, TrainerConfig
from sae.state import autoencoder_tensors
from sae.trainer import Trainer
from storage.errors import MemoryBudgetExceeded
from storage.shards import Layout, WindowBuffer

LAYOUT = Layout(
    n_windows=2, window_prompts=64, positions=15, d_in=1024, chunk_rows=16, encoding="float16", seed=0, n_prompts=130
)


def require(layout: Layout = LAYOUT, budget_bytes: int | None = None) -> None:
    require_memory([layout], model_batch_prompts=4, model_width=96, workers=2, budget_bytes=budget_bytes)


@pytest.fixture
def roomless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with room for windows of 32 prompts, and 500 bytes for rounding: a prompt more takes 60,000."""
    smaller = replace(LAYOUT, window_prompts=32)
    needs = memory.harvest_needs([smaller], model_batch_prompts=4, model_width=96, workers=2)
    monkeypatch.setattr(memory, "available_bytes", lambda: sum(needs.values()) + 500)


def test_what_is_held_and_what_is_left_are_sizes_of_this_machine():
    assert 2**20 < resident_bytes() < 2**40
    assert 2**20 < available_bytes() < 2**50
    before = resident_bytes()
    memory = mmap.mmap(-1, 2**26)  # the kernel's own, not what an allocator has kept of freed objects
    held = np.frombuffer(memory, np.uint8)
    held.fill(1)
    assert resident_bytes() - before > 0.9 * held.nbytes


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert available_bytes() > 5_000_000
    (tmp_path / "memory.max").write_text("9000000\n")
    (tmp_path / "memory.current").write_text("5000000\n")
    (tmp_path / "memory.stat").write_text("anon 4000000\ninactive_file 1000000\n")
    assert available_bytes() == 5_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() > 5_000_000


def test_a_harvest_that_fits_passes():
    require()
    require(budget_bytes=resident_bytes() + 2**28)


def test_a_harvest_needs_two_of_its_buffers_and_more():
    buffer = WindowBuffer(LAYOUT, 0)
    held = sum(len(images._memory) for images in buffer._images.values()) + buffer._places.nbytes
    needs = memory.harvest_needs([LAYOUT], model_batch_prompts=4, model_width=96, workers=2)
    assert 2 * held <= needs["two windows"] <= 2 * held + 40 * LAYOUT.window_rows
    both = memory.harvest_needs([LAYOUT, LAYOUT], model_batch_prompts=4, model_width=96, workers=2)
    assert both["two windows"] > 1.7 * needs["two windows"]


@pytest.mark.usefixtures("roomless")
def test_a_harvest_that_does_not_fit_names_the_window_that_does():
    with pytest.raises(MemoryBudgetExceeded) as refused:
        require()
    assert refused.value.kind == "memory"
    message = str(refused.value)
    assert "harvest.encoding=uint8" in message
    assert "harvest.window_prompts=32 " in message
    require(replace(LAYOUT, window_prompts=32))
    with pytest.raises(MemoryBudgetExceeded):
        require(replace(LAYOUT, window_prompts=48))


def test_a_budget_that_the_process_holds_already_leaves_no_window():
    with pytest.raises(MemoryBudgetExceeded, match="no window of whole chunks of 16 prompts fits"):
        require(budget_bytes=resident_bytes() - 1)


@pytest.mark.parametrize("resampled", [False, True])
def test_a_trainers_state_has_the_size_counted(resampled: bool):
    scheme = {"resampling": AnthropicResampling(interval_steps=2, window_rows=16, sample_rows=16)} if resampled else {}
    sae = TrainerConfig(d_sae=40, l1_coeff=0.1, steps=8, batch_rows=8, density_window_rows=16, **scheme)
    rows = torch.rand(8, 24, generator=torch.Generator().manual_seed(0))
    trainer = Trainer.start(sae, 24, rows, rows.mean(0), threads=1)
    for _ in range(3):
        trainer.step(rows)
    config = TrainConfig(autoencoder=sae)
    assert sum(tensor.nbytes for tensor in trainer.state_tensors().values()) == state_bytes(config, 24)
    assert sum(t.nbytes for t in autoencoder_tensors(trainer.autoencoder).values()) == weight_bytes(config, 24)


def test_densities_are_counted_in_memory_and_in_each_checkpoint():
    def needs(window_rows: int) -> dict[str, int]:
        sae = TrainerConfig(d_sae=40, l1_coeff=0.1, steps=800, batch_rows=8, density_window_rows=window_rows)
        sizes = {"d_in": 24, "pool_bytes": 0, "row_bytes": 96, "prompt_tokens": 16, "d_vocab": 64}
        return dict(training_needs(TrainConfig(autoencoder=sae), **sizes))

    many, none = needs(16), needs(10**6)
    assert (many["densities of features"], none["densities of features"]) == (400 * 40 * 8, 0)
    assert many["a checkpoint being written"] - none["a checkpoint being written"] == 2 * 400 * 40 * 8
