"""report.json as immutable types (schema 1): the only input of the page, the figures and the terminal summary."""

from cushion_deploy.report.document.build import Engine, LargestValue, ParityRow, PlanType, Stage
from cushion_deploy.report.document.report import REPORT_JSON, Report, read_report

__all__ = ["REPORT_JSON", "Engine", "LargestValue", "ParityRow", "PlanType", "Report", "Stage", "read_report"]
