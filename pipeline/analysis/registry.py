"""What an analysis declares of itself, so that the command line, the flows and the report list the same ones.

A module under this package is an analysis when it defines ``VERSION``, ``OPTIONS``, ``REQUIRES``, ``OPTIONAL``,
``TITLE``, ``QUESTION``, ``NUMBERS`` and ``run``. ``ANALYSES`` in the package names them once, in the report's order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.analysis.context import Context, Need
from pipeline.analysis.display import Unit
from pipeline.analysis.result import AnalysisResult
from storage.errors import ConfigError


class AnalysisOptions(BaseModel):
    """Frozen, strict about unknown fields, and described field by field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True)
class NumberLabel:
    """How one number of a result is shown.

    Attributes:
        key: its key in ``AnalysisResult.numbers``.
        label: its name for people.
        unit: how it is formatted.
    """

    key: str
    label: str
    unit: Unit = "plain"


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Attributes:
        name: its name everywhere: command line, config, artifact.
        title: the heading of its section.
        question: the question it answers, in a sentence.
        version: of its output; bumped when that changes.
        options: its options' model.
        requires: what it cannot do without.
        optional: what it uses where it is there.
        numbers: labels of its numbers, in the order of its table.
        run: does it.
    """

    name: str
    title: str
    question: str
    version: int
    options: type[AnalysisOptions]
    requires: frozenset[Need]
    optional: frozenset[Need]
    numbers: tuple[NumberLabel, ...]
    run: Callable[[Context, Any], AnalysisResult]

    @property
    def reads(self) -> frozenset[Need]:
        """Everything it may read."""
        return self.requires | self.optional


def from_module(module: ModuleType) -> Analysis:
    """The analysis that a module defines."""
    declared: Any = module
    return Analysis(
        name=module.__name__.rpartition(".")[2],
        title=declared.TITLE,
        question=declared.QUESTION,
        version=declared.VERSION,
        options=declared.OPTIONS,
        requires=declared.REQUIRES,
        optional=declared.OPTIONAL,
        numbers=declared.NUMBERS,
        run=declared.run,
    )


def choose(analyses: Mapping[str, Analysis], names: tuple[str, ...]) -> list[Analysis]:
    """The analyses named, in the order of the registry, in which each comes after those that it reads.

    Raises:
        ConfigError: a name that no analysis has; the nearest are given.
    """
    for name in names:
        if name not in analyses:
            near = get_close_matches(name, analyses, n=3, cutoff=0.4) or list(analyses)
            raise ConfigError("no such analysis", found=name, expected=f"nearest: {', '.join(near)}")
    return [analysis for name, analysis in analyses.items() if name in names]
