"""What tells autoencoders apart: names for them, from what their trainings differ in.

A label is derived, not given, so that equal parents give equal bytes however a comparison was asked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.analysis.context import Context
from storage.errors import InputError

_NAMED_DIFFERENCES = 3
_SEEDS = frozenset({"seed", "reader_seed"})


class Described(NamedTuple):
    """What an autoencoder says of itself.

    Attributes:
        id: of its artifact.
        model: its language model's name, without a folder.
        model_identity: the model's hashes, or None where they are not known.
        hook_name: its site.
        config: its training config as JSON.
        orthogonal: whether its encoder was kept orthogonal to a direction.
    """

    id: str
    model: str
    model_identity: Any
    hook_name: str
    config: Mapping[str, Any]
    orthogonal: bool


def labels(described: Sequence[Described]) -> list[str]:
    """A label each: what differs from the first one, or the id where that is nothing, much, or said of two.

    Args:
        described: the autoencoders; the first one's label is ``this one``.
    """
    first = described[0]
    found = ["this one", *(", ".join(_differences(one, first)[: _NAMED_DIFFERENCES + 1]) for one in described[1:])]
    plain = [len(_differences(one, first)) <= _NAMED_DIFFERENCES for one in described]
    return [
        label if label and short and found.count(label) == 1 else one.id
        for label, short, one in zip(found, plain, described, strict=True)
    ]


def sites(described: Sequence[Described]) -> list[str]:
    """The hook of each, after its model's name where the models differ."""
    one_model = all(one.model_identity == described[0].model_identity for one in described)
    return [one.hook_name if one_model else f"{one.model} {one.hook_name}" for one in described]


def random_starts_alone(labelled: Sequence[str]) -> bool:
    """Whether autoencoders differ from the first in seeds and nothing else, by their :func:`labels`."""
    return all(word.split()[0] in _SEEDS for label in labelled[1:] for word in label.split(", "))


def need_same_width(context: Context) -> None:
    """Refuses directions of different spaces."""
    for other in context.need_companions():
        if other.sae.d_in != context.sae.d_in:
            raise InputError(
                "the autoencoders are of different widths, so their directions do not compare",
                where=other.label, found=f"{other.sae.d_in} and {context.sae.d_in} inputs", expected="one site",
            )  # fmt: skip


def _differences(one: Described, first: Described) -> list[str]:
    found = [] if one.model_identity == first.model_identity else [one.model]
    found += [] if one.hook_name == first.hook_name else [one.hook_name]
    found += ["orthogonal encoder"] if one.orthogonal and not first.orthogonal else []
    here, there = _flat(one.config), _flat(first.config)
    changed = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
    return found + [f"{name.rpartition('.')[2]} {_text(here.get(name))}" for name in changed]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
