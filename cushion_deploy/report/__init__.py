"""Build reports: report.json, and the page, figures and terminal summary made from it."""

from cushion_deploy.report.document import Report, read_report
from cushion_deploy.report.statements import Verdict, verdict
from cushion_deploy.report.terminal import summary, summary_lines
from cushion_deploy.report.write import write_json, write_report

__all__ = ["Report", "Verdict", "read_report", "summary", "summary_lines", "verdict", "write_json", "write_report"]
