"""Numbers as people read them: a unit decides the digits, a missing value is a dash, a word stays a word."""

from typing import Literal

from pipeline.analysis.result import Number

Unit = Literal["fraction", "count", "nats", "plain", "text"]

NOTHING = "–"
_THIN_SPACE = "\u202f"
_MINUS = "\u2212"


def show(value: Number, unit: Unit = "plain", digits: int = 3) -> str:
    """A number as text.

    Args:
        value: the number; None shows as a dash, a string as it is.
        unit: ``fraction`` shows per cent, ``count`` whole numbers, ``nats`` four decimals.
        digits: significant ones of a ``plain`` number.
    """
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    if unit == "fraction":
        text = f"{_percent(100 * value)}{_THIN_SPACE}%"
    elif unit == "count" or isinstance(value, int):
        text = f"{round(value):,}"
    else:
        text = f"{value:.4f}" if unit == "nats" else _plain(value, digits)
    return text.replace("e-0", "e-").replace("e+0", "e").replace("-", _MINUS)


def percent(value: Number) -> str:
    """A fraction as text, in per cent."""
    return show(value, "fraction")


def show_large(value: float) -> str:
    """A large count in a word or two: 4.7M, 2B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def _percent(value: float) -> str:
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}" if value in (0, 100) else f"{value:.1f}"
    if abs(value) >= 1:
        return f"{value:.1f}"
    return f"{value:.2g}" if abs(value) >= 0.001 else f"{value:.1e}"


def _plain(value: float, digits: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
