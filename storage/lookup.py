"""From a token to the row of a store that holds its activation, and so without an index on disk.

The shuffle is a pure function, so the row follows from the layout: prompt -> place in the prompt order -> window and
slot -> row. Cost: the prompt order once, and one window's places (P L numbers) for each window that is asked for.
Rejected: searching the ``prompt`` array (reads it all).
"""

from functools import cached_property

import numpy as np

from storage.errors import InputError
from storage.shards import Layout
from storage.shuffle import Indices, prompt_order, window_places


class RowLookup:
    """Finds rows of a store by their token.

    Args:
        layout: of the store.
    """

    def __init__(self, layout: Layout):
        self._layout = layout

    def rows(self, prompts: Indices, positions: Indices) -> Indices:
        """Rows of the store.

        Args:
            prompts: prompt numbers in the tokens artifact, int64 (n,).
            positions: positions in these prompts, int64 (n,).

        Returns:
            int64 (n,).

        Raises:
            InputError: a token whose activation is not in the store.
        """
        layout = self._layout
        column = positions - layout.first_position
        known = (prompts >= 0) & (prompts < layout.n_prompts) & (column >= 0) & (column < layout.positions)
        place = self._place_of_prompt[np.where(known, prompts, 0)]
        window, slot = place // layout.window_prompts, place % layout.window_prompts
        known &= window < layout.n_windows
        if not known.all():
            i = int(np.flatnonzero(~known)[0])
            raise InputError("a token that was not harvested", found=f"prompt {prompts[i]}, position {positions[i]}")
        rows = np.empty(len(prompts), np.int64)
        for number in np.unique(window).tolist():
            here = window == number
            places = window_places(layout.seed, number, layout.window_prompts, layout.positions)
            rows[here] = number * layout.window_rows + places[slot[here], column[here]]
        return rows

    @cached_property
    def _place_of_prompt(self) -> Indices:
        order = prompt_order(self._layout.seed, self._layout.n_prompts)
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        return places
