from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import load_preset
from pipeline.planning.mixing import half_refilled, mixings
from pipeline.planning.sizes import Site, Subject
from storage.certificate import measure
from storage.order import BatchOrder

SITE = Site(hook_name="blocks.0.mlp.hook_post", d_in=24)


@pytest.fixture
def subject(tiny_preset: Path) -> Subject:
    overrides = ["harvest.model_batch_prompts=2", "train.pool_rows=2048"]
    return Subject(load_preset(str(tiny_preset), overrides), (SITE,))


def test_the_store_is_uniform_and_a_live_source_of_small_pools_is_not(subject: Subject):
    rows = subject.layouts[0].n_rows
    store, live, published = mixings(subject, 10 * rows)
    assert abs(store.pair_ratio - 1) < 4 * store.standard_error
    assert store.full_pair_ratio == store.pair_ratio
    # Two rows of a batch share a prompt with chance L / (1.5 m): N / (1.5 m) of a uniform shuffle's, and more at first.
    expected = 2500 * 15 / (1.5 * 2048)
    for one in (live, published):
        assert 0.9 * expected < one.pair_ratio < 1.4 * expected
        assert one.full_pair_ratio == pytest.approx(one.pair_ratio * 10 * rows / (2500 * 15), rel=1e-3)
        assert one.distinct_prompts < store.distinct_prompts


def test_a_pool_too_small_for_live_training_leaves_it_out(subject: Subject):
    small = subject.changed(harvest={"model_batch_prompts": 16}, train={"pool_rows": 1024})
    assert [one.source for one in mixings(small, 10**6)] == ["store", "half-refilled buffer"]


def test_the_half_refilled_buffer_hands_out_each_row_once_in_full_batches():
    batches = list(half_refilled(100, 8, pool_rows=128, batch_rows=16))
    assert all(len(batch) == 16 for batch in batches)
    numbers, counts = np.unique(np.concatenate(batches), return_counts=True)
    assert (numbers.tolist(), set(counts.tolist())) == (list(range(100)), {8})


def test_the_half_refilled_buffer_mixes_as_a_plain_simulation_of_it():
    positions, pool, batch, prompts = 8, 1024, 64, 2000
    rng = np.random.default_rng(0)
    waiting = np.repeat(np.arange(prompts), positions).tolist()
    buffer, plain = [waiting.pop(0) for _ in range(pool)], list[np.ndarray]()
    while len(waiting) >= pool // 2:
        rng.shuffle(buffer)
        plain += [np.array(buffer[start : start + batch]) for start in range(0, pool // 2, batch)]
        buffer = buffer[pool // 2 :] + [waiting.pop(0) for _ in range(pool // 2)]
    order = BatchOrder(0, batch, pool)
    facts = {"order": order, "n_rows": prompts * positions, "positions": positions}
    expected = measure(plain, **facts)
    found = measure(half_refilled(prompts, positions, pool, batch), **facts)
    error = 4 * (expected.standard_error + found.standard_error) * expected.pair_ratio**0.5
    assert found.pair_ratio == pytest.approx(expected.pair_ratio, abs=error)


def test_a_large_store_is_measured_on_a_part_of_its_windows(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    from pipeline.planning import mixing

    monkeypatch.setattr(mixing, "_STORE_ROWS", 2 * 256 * 15)
    store = mixings(replace(subject), 10**6)[0]
    assert store.rows == 2 * 256 * 15
