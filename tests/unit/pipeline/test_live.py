from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline import language_model
from pipeline.live import LiveChunks, PromptChunks
from storage.batches import Batch, ShuffledBatches
from storage.certificate import certify, measure
from storage.encoding import ENCODINGS, Encoding, Floats, decode, encode
from storage.errors import ConfigError, InputError, NumericsError
from storage.order import BatchOrder, ReadState
from storage.shuffle import prompt_order

HOOK = "blocks.0.mlp.hook_post"
N_PROMPTS, MODEL_BATCH, POSITIONS, D_IN = 203, 4, 15, 24
CHUNKS = PromptChunks(n_prompts=N_PROMPTS, model_batch_prompts=MODEL_BATCH, positions=POSITIONS, seed=7)
ORDER = BatchOrder(seed=3, batch_rows=200, pool_rows=1200, lanes=8)


class Model:
    """Computes activations of random prompts, and counts who asks."""

    def __init__(self, folder: Path):
        self._model = language_model.load(str(folder))
        self._tokens = torch.randint(0, 64, (N_PROMPTS, 16), generator=torch.Generator().manual_seed(2))
        self._one_at_a_time = Lock()
        self.computed: list[tuple[int, ...]] = []

    def __call__(self, prompts: npt.NDArray[np.int32]) -> torch.Tensor:
        assert self._one_at_a_time.acquire(blocking=False), "two passes at once"
        self.computed.append(tuple(prompts.tolist()))
        found = self._model.activations(self._tokens[torch.from_numpy(prompts).long()], HOOK)[:, 1:]
        self._one_at_a_time.release()
        return found

    def all_activations(self) -> Floats:
        """Of every prompt that is not left out, in the model batches of the docs: float32 (n_prompts, positions, d)."""
        values = np.full((N_PROMPTS, POSITIONS, D_IN), np.nan, np.float32)
        for prompts in prompt_order(7, N_PROMPTS)[:200].reshape(50, MODEL_BATCH):
            values[prompts] = self._model.activations(self._tokens[torch.from_numpy(prompts)], HOOK)[:, 1:].numpy()
        return values


@pytest.fixture
def model(tiny_model: Path) -> Model:
    return Model(tiny_model)


def live(model: Model, encoding: Encoding = "float32") -> ShuffledBatches:
    return LiveChunks(CHUNKS, model, d_in=D_IN, encoding=encoding).batches()


def tokens(batches: list[Batch]) -> list[tuple[int, int]]:
    return [(int(p), int(t)) for batch in batches for p, t in zip(batch.prompt, batch.position, strict=True)]


def assert_same(found: Batch, expected: Batch) -> None:
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.prompt, expected.prompt)
    np.testing.assert_array_equal(found.position, expected.position)
    assert found.state == expected.state


def test_each_row_comes_once_an_epoch_with_the_models_activation_of_its_token(model: Model):
    source, values = live(model), model.all_activations()
    with source.batches(ORDER) as batches:
        both = list(islice(batches, 30))
    whole = [(int(p), t) for p in prompt_order(7, N_PROMPTS)[:200] for t in range(1, 16)]
    for epoch in (both[:15], both[15:]):
        assert sorted(tokens(epoch)) == sorted(whole)
        for batch in epoch:
            np.testing.assert_array_equal(batch.rows, values[batch.prompt, batch.position - 1])
    assert tokens(both[:15]) != tokens(both[15:])
    assert (source.n_rows, source.d_in, source.positions, source.batches_per_epoch(ORDER)) == (3000, D_IN, 15, 15)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_are_kept_in_the_encoding_of_the_harvest(model: Model, encoding: Encoding):
    values = model.all_activations()
    source = live(model, encoding)
    for batch in source.epoch(ORDER):
        codes, scale = encode(values[batch.prompt, batch.position - 1], encoding)
        np.testing.assert_array_equal(batch.rows, decode(codes, encoding, scale))
    row_bytes = encode(np.ones((1, D_IN), np.float32), encoding).codes.nbytes + (8 if encoding == "uint8" else 0) + 6
    assert source.pool_bytes(ORDER) <= row_bytes * (2.5 * ORDER.pool_rows + 2 * ORDER.batch_rows + (8 + 1) * 60)


@pytest.mark.parametrize("start", range(15))
def test_resumed_after_any_batch_it_continues_with_the_same_batches(model: Model, start: int):
    with live(model).batches(ORDER) as batches:
        whole = list(islice(batches, 17))
    with live(model).batches(ORDER, start=ReadState(0, start), prefetch=0) as batches:
        for expected in whole[start:]:
            assert_same(next(batches), expected)


def test_resuming_computes_only_what_is_still_to_come(model: Model):
    list(live(model).epoch(ORDER, start=ReadState(0, 14), prefetch=0))
    assert len(model.computed) <= 1.5 * 20 + 2 * 8


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_same_batches(model: Model, world: int):
    ranks = [list(live(model).epoch(ORDER, rank=rank, world=world)) for rank in range(world)]
    for number, whole in enumerate(live(model).epoch(ORDER)):
        parts = [rank[number] for rank in ranks]
        rows = np.concatenate([part.rows for part in parts])
        order = np.lexsort(rows.T)
        np.testing.assert_array_equal(rows[order], whole.rows[np.lexsort(whole.rows.T)])
        assert sorted(tokens(parts)) == sorted(tokens([whole]))
        assert {part.state for part in parts} == {whole.state}


def test_the_model_runs_once_a_chunk_and_shared_ones_once_for_each_lane(model: Model):
    list(live(model).epoch(ORDER))
    computed = sorted(model.computed)
    shared = {chunk for chunk in computed if computed.count(chunk) > 1}
    assert len(set(computed)) == 50
    assert len(shared) == 50 % 8
    assert len(computed) == 48 + 8  # the two that do not go round make a quarter each for eight lanes
    model.computed.clear()
    list(live(model).epoch(ORDER, rank=0, world=4))
    assert len(model.computed) == 48 // 4 + 2


def test_prompts_alone_are_those_of_the_batches_and_run_no_model(model: Model):
    source = live(model)
    expected = [batch.prompt for batch in source.epoch(ORDER)]
    model.computed.clear()
    for found in (list(source.prompts(ORDER)), list(CHUNKS.batches().prompts(ORDER))):
        for prompts, batch in zip(found, expected, strict=True):
            np.testing.assert_array_equal(prompts, batch)
    assert certify(source, ORDER) == certify(CHUNKS.batches(), ORDER)
    assert model.computed == []


def test_iterators_side_by_side_take_turns_at_the_model(model: Model):
    source = live(model)
    alone = list(source.epoch(ORDER))
    for found, again, expected in zip(source.epoch(ORDER), source.epoch(ORDER), alone, strict=True):
        assert_same(found, expected)
        assert_same(again, expected)


@pytest.mark.parametrize(("bad", "encoding"), [(np.nan, "float32"), (np.inf, "uint8"), (70_000, "float16")])
def test_a_value_that_cannot_be_kept_stops_and_names_its_token(bad: float, encoding: Encoding):
    def compute(prompts: npt.NDArray[np.int32]) -> torch.Tensor:
        rows = torch.zeros(len(prompts), POSITIONS, D_IN)
        rows[torch.from_numpy(prompts == wanted), 5, 1] = bad
        return rows

    wanted = int(CHUNKS.prompts[31, 2])
    source = LiveChunks(CHUNKS, compute, d_in=D_IN, encoding=encoding).batches()
    for prefetch in (0, 2):
        with (
            source.batches(ORDER, prefetch=prefetch) as batches,
            pytest.raises(NumericsError, match=f"prompt {wanted}, position 6"),
        ):
            list(islice(batches, 15))


def test_what_cannot_be_mixed_or_computed_is_refused(model: Model):
    with pytest.raises(ConfigError, match="20 chunks of 60 rows"):
        live(model).batches(replace(ORDER, pool_rows=1199))
    with pytest.raises(InputError, match="found 3; expected 4"):
        PromptChunks(n_prompts=3, model_batch_prompts=4, positions=5)


PUBLISHED_ROWS = 4096 * 384
REFILL = 192  # batches in half of them


def published_buffer(n_prompts: int, positions: int) -> Iterator[npt.NDArray[np.int32]]:
    """Prompt numbers of the published buffer's batches, its view of overwritten memory included."""
    rng = np.random.default_rng(0)
    buffer = np.repeat(np.arange(PUBLISHED_ROWS // positions, dtype=np.int32), positions)
    following, pointer = PUBLISHED_ROWS // positions, 0
    rng.shuffle(buffer)
    half = len(buffer) // 2
    while following + half // positions <= n_prompts:
        out = buffer[pointer : pointer + 4096]
        pointer += 4096
        if pointer > half - 4096:
            buffer[:half] = np.repeat(np.arange(following, following + half // positions), positions)
            following, pointer = following + half // positions, 0
            buffer = rng.permutation(buffer)
        yield out


def test_mixing_at_full_size_is_what_the_docs_say_and_free_of_the_published_bug():
    n_prompts, positions = 50_000, 127
    order = BatchOrder(seed=5, batch_rows=4096, pool_rows=PUBLISHED_ROWS)
    source = PromptChunks(n_prompts=n_prompts, model_batch_prompts=32, positions=positions).batches()
    batches = list(source.prompts(order))

    def ratio(of: list[npt.NDArray[np.int32]]) -> float:
        return measure(of, order=order, n_rows=source.n_rows, positions=positions).pair_ratio

    pooled = source.n_rows / (1.5 * PUBLISHED_ROWS)
    assert ratio(batches[:REFILL]) == pytest.approx(1.5 * pooled, rel=0.02)
    assert ratio(batches[3 * REFILL : 5 * REFILL]) == pytest.approx(pooled, rel=0.02)
    assert 0.9 * pooled < ratio(batches) < 1.1 * pooled
    assert max(np.bincount(batch).max() for batch in batches) < 10


def test_the_published_buffer_is_worse_by_its_bug():
    n_prompts, positions = 40_960, 128
    order = BatchOrder(seed=5, batch_rows=4096, pool_rows=PUBLISHED_ROWS)
    batches = [batch.copy() for batch in published_buffer(n_prompts, positions)]
    whole = [np.array_equal(np.sort(batch), np.repeat(np.unique(batch), positions)) for batch in batches]
    assert sum(whole) == len(batches) // REFILL > 3
    found = measure(batches, order=order, n_rows=n_prompts * positions, positions=positions)
    source = PromptChunks(n_prompts=n_prompts, model_batch_prompts=32, positions=positions).batches()
    assert found.pair_ratio > 3 * certify(source, order, max_batches=64).pair_ratio
