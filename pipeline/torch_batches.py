"""Shuffled batches as torch wants them: a dataset for a ``DataLoader``, and tensors sent to a device one batch ahead.

The order of the batches and their preparation in a thread are the reader's own (storage.order, storage.batches); here
arrays become tensors. As the reader prefetches already, a ``DataLoader`` adds little: with ``num_workers=0`` it is a
plain loop, with ``num_workers=1`` reading has a process of its own. More workers would each read every batch, so they
are refused; ranks are what shares out the work. A batch carries the state after it, so where a training resumes depends
on the last batch it *used*, whatever a loader or a device copy had read ahead.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from storage.batches import Batch
from storage.errors import ConfigError
from storage.order import BatchOrder, ReadState
from storage.prefetch import Prefetched


class TorchBatch(NamedTuple):
    """Rows of activations, as tensors.

    Attributes:
        rows: activations, float32 (b, d_in).
        prompt: prompt number in the tokens artifact of each row, int32 (b,).
        position: position in its prompt of each row, int32 (b,).
        state: where the reader is after this batch.
    """

    rows: torch.Tensor
    prompt: torch.Tensor
    position: torch.Tensor
    state: ReadState


class BatchSource(Protocol):
    """What has shuffled batches: the reader of a store, or activations computed as they are needed."""

    def batches(
        self, order: BatchOrder, *, start: ReadState = ..., rank: int = ..., world: int = ..., prefetch: int = ...
    ) -> Prefetched[Batch]:
        """Epoch after epoch without end."""
        ...

    def epoch(
        self, order: BatchOrder, *, start: ReadState = ..., rank: int = ..., world: int = ..., prefetch: int = ...
    ) -> Prefetched[Batch]:
        """To the end of the epoch of ``start``."""
        ...


class TorchBatches(IterableDataset[TorchBatch]):
    """Shuffled batches for a ``DataLoader(dataset, batch_size=None)`` with no worker or one.

    Args:
        source: such as ``sparsemill.open_activations("latest")``.
        order: what the order of the rows depends on.
        start: the state of the last batch used; each iteration begins there. A plain attribute: set it to go on.
        endless: epoch after epoch without end; otherwise an iteration ends with the epoch of ``start``.
        rank: of this process among those that share the batches; torch.distributed's by default, or 0.
        world: how many share them; torch.distributed's by default, or 1. Divides ``order.lanes``.
        prefetch: batches made ahead in a thread.

    Raises:
        ConfigError: one of rank and world was given without the other.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> dataset = sparsemill.TorchBatches(sparsemill.open_activations("latest"), order, endless=False)
        >>> for batch in DataLoader(dataset, batch_size=None, num_workers=1):
        ...     loss = step(batch.rows)
        >>> dataset.start = batch.state  # the next iteration is the next epoch
    """

    def __init__(
        self,
        source: BatchSource,
        order: BatchOrder,
        *,
        start: ReadState = ReadState(),  # noqa: B008 - frozen
        endless: bool = True,
        rank: int | None = None,
        world: int | None = None,
        prefetch: int = 2,
    ):
        if (rank is None) != (world is None):
            raise ConfigError("rank and world belong together", found=f"rank {rank}, world {world}")
        self.start = start
        self._source = source
        self._order = order
        self._endless = endless
        self._prefetch = prefetch
        # Settled here, in the process that is the rank: a DataLoader's worker is not part of the process group.
        self._rank, self._world = _distributed() if rank is None or world is None else (rank, world)

    def __iter__(self) -> Iterator[TorchBatch]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ConfigError(
                "each worker of a DataLoader would read every batch", found=f"num_workers={worker.num_workers}",
                expected="0 or 1", remedy="the reader prefetches in threads of its own",
            )  # fmt: skip
        read = self._source.batches if self._endless else self._source.epoch
        with read(
            self._order, start=self.start, rank=self._rank, world=self._world, prefetch=self._prefetch
        ) as batches:
            for batch in batches:
                yield as_tensors(batch)


def as_tensors(batch: Batch) -> TorchBatch:
    """A batch as tensors that share its memory."""
    rows, prompt, position = (torch.from_numpy(array) for array in (batch.rows, batch.prompt, batch.position))
    return TorchBatch(rows, prompt, position, batch.state)


def to_device(batches: Iterable[Batch | TorchBatch], device: torch.device | str) -> Iterator[TorchBatch]:
    """The same batches on a device.

    On CUDA each is pinned and its copy begun, on a stream of its own, before the one ahead of it is handed out, so that
    the copy and the work on that one overlap. Elsewhere each is moved when it is asked for.

    Args:
        batches: of a reader, or of a ``DataLoader`` over :class:`TorchBatches`; not closed here.
        device: where the tensors go.

    Examples:
        >>> with sparsemill.open_activations("latest").epoch(order) as batches:
        ...     for batch in to_device(batches, "cpu"):  # or "cuda"
        ...         loss = step(batch.rows)
    """
    device = torch.device(device)
    tensors = (batch if isinstance(batch, TorchBatch) else as_tensors(batch) for batch in batches)
    return _copied_ahead(tensors, device) if device.type == "cuda" else (_moved(batch, device) for batch in tensors)


def _copied_ahead(batches: Iterator[TorchBatch], device: torch.device) -> Iterator[TorchBatch]:
    stream = torch.cuda.Stream(device)
    coming: tuple[TorchBatch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            ahead = _moved(batch, device), torch.cuda.Event()
            ahead[1].record(stream)
        if coming is not None:
            yield _arrived(*coming)
        coming = ahead
    if coming is not None:
        yield _arrived(*coming)


def _arrived(batch: TorchBatch, copied: torch.cuda.Event) -> TorchBatch:
    """The batch, safe to use, and to let go of, on the caller's stream."""
    stream = torch.cuda.current_stream(batch.rows.device)
    stream.wait_event(copied)
    for tensor in batch[:3]:
        tensor.record_stream(stream)
    return batch


def _moved(batch: TorchBatch, device: torch.device) -> TorchBatch:
    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    return TorchBatch(move(batch.rows), move(batch.prompt), move(batch.position), batch.state)


def _distributed() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
