"""What becomes of the projection on a direction when the text before a token, or the token, is edited.

The author looked at top examples and found that the projection "drops when seemingly non-semantic edits are made to the
text". Here each edit is made to every top example, and the language model is run again up to the hook. Edits are of
tokens: a token of another case, or with or without its leading space, is the token of the vocabulary with that text, so
that position and everything else of the prompt stay; where the vocabulary has none the token stays as it is. An example
that an edit cannot change is left out of that edit's means. The beginning-of-prompt token is never edited. Rejected:
editing the text and tokenizing it again, which moves every later boundary along with what was meant to change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from pipeline.analysis import statistics
from pipeline.analysis.context import Context, Floats, Integers
from pipeline.analysis.direction_pass import OuterRow

_FIRST = 1


class EditOutcome(NamedTuple):
    """What one edit does to the projection.

    Attributes:
        edit: its name.
        examples: examples that it changes.
        before: mean projection of these as they are.
        after: mean projection of these edited.
    """

    edit: str
    examples: int
    before: float
    after: float

    def share_left(self, mean: float) -> float:
        """What is left of a projection above a mean; NaN where there was nothing above it."""
        left = statistics.ratio(self.after - mean, self.before - mean)
        return float("nan") if left is None else left


def try_edits(context: Context, direction: Floats, examples: Sequence[OuterRow], *, batch: int) -> list[EditOutcome]:
    """Makes every edit to every example; one that changes no example has no outcome.

    Args:
        context: the language model and the prompts.
        direction: a unit vector, (d_in,).
        examples: the rows whose texts are edited.
        batch: prompts a forward pass.
    """
    if not examples:
        return []
    prompts = context.need_tokens().prompts("train", [row.prompt for row in examples]).astype(np.int64)
    positions = np.array([row.position for row in examples])
    plain = _project(context, direction, prompts, positions, batch)
    vocabulary = _Vocabulary(context.token_strings or ())
    rng = context.rng("rare direction edits")
    donors = rng.integers(context.need_tokens().n_prompts("train"), size=len(examples)).tolist()
    donated = context.need_tokens().prompts("train", donors).astype(np.int64)
    earlier = [int(rng.integers(_FIRST, max(position, _FIRST + 1))) for position in positions.tolist()]
    outcomes: list[EditOutcome] = []
    for name, edit in EDITS.items():
        made = [
            edit(_Place(prompt, int(position), donor, other, vocabulary))
            for prompt, position, donor, other in zip(prompts, positions, donated, earlier, strict=True)
        ]
        kept = [number for number, edited in enumerate(made) if edited is not None]
        if kept:
            edited = [found for found in made if found is not None]
            ids, where = np.stack([ids for ids, _ in edited]), np.array([position for _, position in edited])
            after = _project(context, direction, ids, where, batch)
            outcomes.append(EditOutcome(name, len(kept), float(plain[kept].mean()), float(after.mean())))
    return outcomes


@dataclass(frozen=True)
class _Vocabulary:
    strings: Sequence[str]

    @cached_property
    def ids(self) -> dict[str, int]:
        """The first id of each text."""
        return {text: number for number, text in reversed(list(enumerate(self.strings)))}

    def change(self, token: int, change: Callable[[str], str]) -> int:
        """The token of the changed text, or the same token where there is none."""
        return self.ids.get(change(self.strings[token]), token)


class _Place(NamedTuple):
    """An example, and what edits may use.

    Attributes:
        ids: its prompt, (T,).
        position: its token's.
        donor: another prompt, (T,): what tokens are replaced by.
        earlier: a random position before the token's.
        vocabulary: the texts of tokens.
    """

    ids: Integers
    position: int
    donor: Integers
    earlier: int
    vocabulary: _Vocabulary


_Edited = tuple[Integers, int]


def _delete(place: _Place, at: int) -> _Edited | None:
    if not _FIRST <= at < place.position:
        return None
    return np.append(np.delete(place.ids, at), place.ids[-1]), place.position - 1


def _replace(place: _Place, at: int) -> _Edited | None:
    return _rewrite(place, range(at, at + 1), lambda number: int(place.donor[number]))


def _rewrite(place: _Place, where: range, token: Callable[[int], int]) -> _Edited | None:
    ids = place.ids.copy()
    for number in where:
        if _FIRST <= number <= place.position:
            ids[number] = token(number)
    return None if np.array_equal(ids, place.ids) else (ids, place.position)


def _change(place: _Place, where: range, change: Callable[[str], str]) -> _Edited | None:
    return _rewrite(place, where, lambda number: place.vocabulary.change(int(place.ids[number]), change))


def _other_case(text: str) -> str:
    """The text with the case of its first letter turned."""
    at = next((number for number, letter in enumerate(text) if letter.isalpha()), None)
    return text if at is None else text[:at] + text[at].swapcase() + text[at + 1 :]


def _other_spacing(text: str) -> str:
    """The text without its leading space, or with one."""
    return text[1:] if text.startswith(" ") else f" {text}"


EDITS: dict[str, Callable[[_Place], _Edited | None]] = {
    "token before it deleted": lambda place: _delete(place, place.position - 1),
    "first token deleted": lambda place: _delete(place, _FIRST),
    "token before it replaced": lambda place: _replace(place, place.position - 1),
    "some earlier token replaced": lambda place: (
        _replace(place, place.earlier) if place.earlier < place.position else None
    ),
    "token itself replaced": lambda place: _replace(place, place.position),
    "case of the token": lambda place: _change(place, range(place.position, place.position + 1), _other_case),
    "case of all before it": lambda place: _change(place, range(place.position), _other_case),
    "space before the token": lambda place: _change(place, range(place.position, place.position + 1), _other_spacing),
    "spaces in all before it": lambda place: _change(place, range(place.position), _other_spacing),
}
"""Edits by name; None where there is nothing to change."""


def _project(context: Context, direction: Floats, ids: Integers, positions: Integers, batch: int) -> Floats:
    along = torch.from_numpy(direction)
    model = context.need_model()
    found = [
        model.activations(part, context.hook_name)[torch.arange(len(part)), where].double() @ along
        for part, where in zip(
            torch.from_numpy(ids).split(batch), torch.from_numpy(positions).split(batch), strict=True
        )
    ]
    return torch.cat(found).numpy()
