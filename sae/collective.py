"""Ranks of a data-parallel training, as far as the trainer needs them: sums over all, equal bits on each.

``Alone`` is the usual case. ``Group`` is ``torch.distributed``'s default group, whose start and end are the caller's
affair. Everything a rank decides follows from its own configuration and from sums, which every rank sees alike.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed
from torch import Tensor


class Collective(Protocol):
    """Some processes that train together."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        ...

    @property
    def world(self) -> int:
        """How many there are."""
        ...

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor, in place, by its sum over all ranks; shapes and types are the same on each."""
        ...


class Alone:
    """One process."""

    rank = 0
    world = 1

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Leaves tensors as they are."""


class Group:
    """The default group of ``torch.distributed``, which was initialised before."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        return torch.distributed.get_rank()

    @property
    def world(self) -> int:
        """How many there are."""
        return torch.distributed.get_world_size()

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """All-reduces each tensor."""
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def gathered(collective: Collective, rows: Tensor) -> tuple[Tensor, int]:
    """Rows of all ranks, one rank's after another's, and where this one's begin.

    Args:
        collective: the ranks.
        rows: (n, ...) of this rank; n may differ between ranks, and be 0.
    """
    if collective.world == 1:
        return rows, 0
    counts = torch.zeros(collective.world, dtype=torch.int64, device=rows.device)
    counts[collective.rank] = rows.shape[0]
    collective.sum_([counts])
    start = int(counts[: collective.rank].sum())
    everything = rows.new_zeros(int(counts.sum()), *rows.shape[1:])
    everything[start : start + rows.shape[0]] = rows
    collective.sum_([everything])
    return everything, start
