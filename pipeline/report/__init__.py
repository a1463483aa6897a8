"""The report: a folder of HTML that opens by double click, with no network and no server."""

from pipeline.report.comparison import write_comparison
from pipeline.report.inputs import Column, ComparisonInputs, LineageStep, ReportInputs, Section
from pipeline.report.writer import write_report

__all__ = [
    "Column",
    "ComparisonInputs",
    "LineageStep",
    "ReportInputs",
    "Section",
    "write_comparison",
    "write_report",
]
