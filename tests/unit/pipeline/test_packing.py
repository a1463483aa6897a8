import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import packing
from pipeline.packing import Packed, Packer, RowSplitter, interleave, pack_documents

BOS, EOS = 1000, 1001
DOCUMENTS = st.lists(st.lists(st.integers(0, 999), max_size=30), max_size=12)


def arrays(documents: list[list[int]]):
    return [(number, np.array(ids, np.int32)) for number, ids in enumerate(documents)]


def joined(blocks: list[Packed]) -> tuple[list[list[int]], list[int]]:
    return [row for block in blocks for row in block.prompts.tolist()], [n for b in blocks for n in b.document.tolist()]


def cut(documents: list[list[int]], prompt_tokens: int, bos: list[int], eos: list[int]):
    """The whole stream cut at once: prompts, and the document that each begins in."""
    stream = [(token, i) for i, ids in enumerate(documents) for token in [*ids, *eos]]
    body = prompt_tokens - len(bos)
    pieces = [stream[start : start + body] for start in range(0, len(stream) - body + 1, body)]
    return [[*bos, *(token for token, _ in piece)] for piece in pieces], [piece[0][1] for piece in pieces]


def test_a_worked_example():
    documents = arrays([[1, 2, 3], [4], [5, 6, 7]])
    prompts, document = joined(list(pack_documents(documents, prompt_tokens=4, bos_id=BOS, eos_id=EOS)))
    assert prompts == [[BOS, 1, 2, 3], [BOS, EOS, 4, EOS], [BOS, 5, 6, 7]]
    assert document == [0, 0, 2]


@settings(deadline=None)
@given(DOCUMENTS, st.integers(2, 9))
def test_equals_cutting_the_whole_stream(documents: list[list[int]], prompt_tokens: int):
    packed = list(pack_documents(arrays(documents), prompt_tokens=prompt_tokens, bos_id=BOS, eos_id=EOS))
    assert joined(packed) == cut(documents, prompt_tokens, [BOS], [EOS])


@settings(deadline=None)
@given(DOCUMENTS, st.integers(2, 9), st.booleans(), st.booleans(), st.integers(1, 5), st.integers(1, 9))
def test_prompts_taken_now_and_then_and_resumed_from_the_carry_are_the_same(
    documents: list[list[int]], prompt_tokens: int, bos: bool, eos: bool, every: int, at_once: int
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_IDS_AT_ONCE", at_once)
        blocks = _packed_now_and_then(documents, prompt_tokens, bos, eos, every)
    assert joined(blocks) == cut(documents, prompt_tokens, [BOS] * bos, [EOS] * eos)


def _packed_now_and_then(
    documents: list[list[int]], prompt_tokens: int, bos: bool, eos: bool, every: int
) -> list[Packed]:
    packer = Packer(prompt_tokens, BOS if bos else None, EOS if eos else None)
    blocks: list[Packed] = []
    for number, ids in arrays(documents):
        packer.add(number, ids[:2], ids[2:])
        if number % every == 0:
            expected = packer.whole
            blocks.append(packer.take())
            assert len(blocks[-1].prompts) == expected
            assert len(packer.carry) < prompt_tokens
            another = Packer(prompt_tokens, packer.bos_id, packer.eos_id)
            another.resume(packer.carry, packer.owner)
            packer = another
    return [*blocks, packer.take()]


def test_rows_of_1024_are_cut_into_8_prompts_of_128_with_bos_over_the_first_id_of_each():
    rows = np.random.default_rng(0).integers(0, 1000, (3, 1024)).astype(np.int32)
    splitter = RowSplitter(128, BOS)
    for number, row in enumerate(rows):
        splitter.add(10 + number, row)
    assert splitter.whole == 24
    prompts, document = splitter.take()
    expected = rows.reshape(24, 128).copy()
    expected[:, 0] = BOS
    np.testing.assert_array_equal(prompts, expected)
    assert document.tolist() == [10] * 8 + [11] * 8 + [12] * 8
    assert splitter.whole == len(splitter.take().prompts) == 0
    assert (rows[:, 0] != BOS).all()


def test_what_is_left_of_a_row_is_left_out():
    splitter = RowSplitter(4, None)
    splitter.add(0, np.arange(11, dtype=np.int32))
    splitter.add(1, np.arange(3, dtype=np.int32))
    assert splitter.take().prompts.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("sizes", [(80, 20), (7, 0, 3), (1, 1000), (0, 5)])
def test_any_stretch_of_interleaved_blocks_holds_their_shares_in_their_order(sizes: tuple[int, ...]):
    blocks = [
        Packed(np.full((size, 2), source, np.int32), np.arange(size, dtype=np.int32))
        for source, size in enumerate(sizes)
    ]
    (prompts, document), source = interleave(blocks)
    assert (prompts[:, 0] == source).all()
    for number, size in enumerate(sizes):
        assert document[source == number].tolist() == list(range(size))
        so_far = np.cumsum(source == number)
        expected = np.arange(1, len(source) + 1) * size / len(source)
        assert (np.abs(so_far - expected) <= 1.5).all()
