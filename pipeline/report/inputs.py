"""What a report is written from: plain values, no artifact store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.analysis.published import HeadlineRow, Highlight
from pipeline.analysis.result import AnalysisResult


@dataclass(frozen=True)
class LineageStep:
    """One artifact on the way from documents to findings.

    Attributes:
        stage: ``tokenize``, ``harvest``, ``train``...
        artifact_id: its id.
        facts: a few of its figures, as text by name.
    """

    stage: str
    artifact_id: str
    facts: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Section:
    """One analysis in the report.

    Attributes:
        name: the analysis' name in the registry.
        artifact_id: its artifact.
        options: its options, as JSON values by name.
        result: what it found.
        command: the command line that makes it again.
    """

    name: str
    artifact_id: str
    options: Mapping[str, object]
    result: AnalysisResult
    command: str = ""


@dataclass(frozen=True)
class ReportInputs:
    """Everything a report shows.

    Attributes:
        title: its heading.
        preset: the preset's name.
        facts: what was run, as text by name, in order.
        lineage: the artifacts, upstream first.
        sections: the analyses, in order.
        headline: this run beside the post (``published.headline_rows``).
        note: what the comparison means for this run (``published.comparison_note``).
        highlights: the strip of figures at the top (``published.highlights``).
        summary: a sentence under the title.
        command: the command line that makes the autoencoder again.
        version: of this package.
    """

    title: str
    preset: str
    facts: Mapping[str, str]
    lineage: Sequence[LineageStep]
    sections: Sequence[Section]
    headline: Sequence[HeadlineRow] = ()
    note: str = ""
    highlights: Sequence[Highlight] = ()
    summary: str = ""
    command: str = ""
    version: str = ""


@dataclass(frozen=True)
class Column:
    """One of several autoencoders side by side.

    Attributes:
        letter: what the page calls it.
        artifact_id: the autoencoder's artifact.
        report_id: the report on it alone, which lies beside the comparison in the artifact store.
        facts: what was run, as text by name, in order.
        settings: of its training, as text by name.
        headline: its numbers beside the post's.
        sections: its analyses, in order.
    """

    letter: str
    artifact_id: str
    report_id: str
    facts: Mapping[str, str]
    settings: Mapping[str, str]
    headline: Sequence[HeadlineRow]
    sections: Sequence[Section]


@dataclass(frozen=True)
class ComparisonInputs:
    """Everything a comparison shows.

    Attributes:
        columns: the autoencoders, in order.
        matches: which features of the first the others have too, where that was asked.
        command: the command line that makes it again.
        version: of this package.
    """

    columns: Sequence[Column]
    matches: Section | None = None
    command: str = ""
    version: str = ""
