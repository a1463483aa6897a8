import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.packing import pack_documents

BOS, EOS = 1000, 1001


def pack(documents: list[list[int]], prompt_tokens: int):
    numbered = ((i, np.array(ids, np.int32)) for i, ids in enumerate(documents))
    blocks = list(pack_documents(numbered, prompt_tokens=prompt_tokens, bos_id=BOS, eos_id=EOS))
    if not blocks:
        return np.empty((0, prompt_tokens), np.int32), np.empty(0, np.int32)
    return np.concatenate([block[0] for block in blocks]), np.concatenate([block[1] for block in blocks])


def test_a_worked_example():
    prompts, document = pack([[1, 2, 3], [4], [5, 6, 7]], prompt_tokens=4)
    assert prompts.tolist() == [[BOS, 1, 2, 3], [BOS, EOS, 4, EOS], [BOS, 5, 6, 7]]
    assert document.tolist() == [0, 0, 2]


@given(
    st.lists(st.lists(st.integers(0, 999), max_size=30), max_size=12),
    st.integers(2, 9),
)
def test_equals_cutting_the_whole_stream(documents: list[list[int]], prompt_tokens: int):
    stream = [(token, i) for i, ids in enumerate(documents) for token in [*ids, EOS]]
    body = prompt_tokens - 1
    pieces = [stream[start : start + body] for start in range(0, len(stream) - body + 1, body)]
    prompts, document = pack(documents, prompt_tokens)
    assert prompts.tolist() == [[BOS, *(token for token, _ in piece)] for piece in pieces]
    assert document.tolist() == [piece[0][1] for piece in pieces]
