"""The report: a folder of HTML that opens by double click, with no network and no server."""

from pipeline.report.inputs import LineageStep, ReportInputs, Section
from pipeline.report.writer import write_report

__all__ = ["LineageStep", "ReportInputs", "Section", "write_report"]
