"""The long loops of analyses: over batches of rows or of prompts, of each of which a part of the answer is computed.

A part depends on the context and on its batch alone. The analysis takes the parts in, in the order of the batches,
whoever computed them: so sums are added up in one order, and results have the same bytes wherever their parts are from.
Batches and parts are sent between processes, so they are small: a batch says what to read. Rejected: sums over several
batches in each process (float addition in another order is other bytes).
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar

from pipeline.progress import Quiet, Reporter

if TYPE_CHECKING:
    from pipeline.analysis.context import Context, Need, Split

B = TypeVar("B", bound=Sized)
T = TypeVar("T")

Parts: TypeAlias = Callable[[Sequence[B]], Iterator[T]]
"""From batches that follow each other to a part each."""

_LOGITS = 4  # copies at once: theirs, in float32, of their softmax, and gradients
_FEATURES = 3  # before and after the ReLU, and of those that a condition keeps


@dataclass(frozen=True)
class Pass(Generic[B, T]):
    """A loop over batches.

    Attributes:
        label: its name beside the progress bar.
        unit: what a batch is so many of: rows, prompts.
        batches: what each is, in order.
        reads: what it needs of the context beside the autoencoder.
        needs: bytes that it takes beside its process and what it reads, by what they are for.
        opening: prepares what all batches need, once, and returns what computes their parts; it can be pickled, and is
            small, as it is sent with every piece of the work.
    """

    label: str
    unit: str
    batches: Sequence[B]
    reads: "frozenset[Need]"
    needs: Mapping[str, int]
    opening: "Callable[[Context], Parts[B, T]]"

    @property
    def n_units(self) -> int:
        """Units of all batches."""
        return sum(len(batch) for batch in self.batches)


class Passes(Protocol):
    """Where passes are computed."""

    def in_order(self, work: Pass[B, T], context: "Context") -> Generator[T]:
        """Computes a pass over all its batches.

        Args:
            work: the pass.
            context: what it reads.

        Returns:
            A part a batch, in the order of the batches.
        """
        ...


@dataclass(frozen=True)
class Here:
    """Passes in this process.

    Attributes:
        reporter: shows how far they are.
    """

    reporter: Reporter = field(default_factory=Quiet)

    def in_order(self, work: Pass[B, T], context: "Context") -> Generator[T]:
        """See ``Passes``."""
        with self.reporter.track(work.label, work.n_units, work.unit) as advance:
            for batch, part in zip(work.batches, work.opening(context)(work.batches), strict=True):
                yield part
                advance(len(batch))


def in_batches(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    """Numbers of rows or prompts, in batches of a size; the last has what is left."""
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def model_needs(context: "Context", split: "Split", prompts: int, *, copies: int) -> dict[str, int]:
    """What a pass of the language model to its logits takes, and the autoencoder beside it.

    Args:
        context: both, and the prompts.
        split: of the prompts.
        prompts: at once.
        copies: of their activations at once.
    """
    tokens = prompts * context.need_tokens().prompts(split, []).shape[1]
    return {
        "logits": _LOGITS * 4 * tokens * context.need_model().W_U.shape[1],
        "activations": 4 * copies * tokens * context.sae.d_in,
        "features": _FEATURES * 4 * tokens * context.sae.d_sae,
    }
