"""Tokens of training prompts in their text, as the three columns that a report shows as one passage."""

from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa

from pipeline.analysis.context import Context

BEFORE, AFTER = 24, 6


class Passage(NamedTuple):
    """A token in its text.

    Attributes:
        before: text of the tokens before it.
        token: its text.
        after: text of the tokens after it.
    """

    before: str
    token: str
    after: str


def around(context: Context, prompt: int, position: int) -> Passage:
    """A token of a training prompt in its text; empty where there are no prompts."""
    if context.tokens is None or context.token_strings is None:
        return Passage("", "", "")
    ids = context.tokens.prompts("train", [prompt])[0].tolist()
    words = [str(context.token_strings[number]) for number in ids]
    end = position + 1
    return Passage("".join(words[max(0, position - BEFORE) : position]), words[position], "".join(words[end:][:AFTER]))


def columns(context: Context, places: Iterable[tuple[int, int]]) -> dict[str, pa.Array]:
    """The columns ``prompt``, ``position``, ``before``, ``token`` and ``after`` of a table.

    Args:
        context: the prompts.
        places: prompt and position of each row.
    """
    kept = list(places)
    passages = [around(context, prompt, position) for prompt, position in kept]
    return {
        "prompt": pa.array([prompt for prompt, _ in kept], pa.int64()),
        "position": pa.array([position for _, position in kept], pa.int64()),
        **{name: pa.array([getattr(one, name) for one in passages], pa.string()) for name in Passage._fields},
    }
