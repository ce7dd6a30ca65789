"""The proof beside a bundle: report.json, the page and figures made from it, and a summary for the terminal."""

from cushion_deploy.report.document import Report, read_report
from cushion_deploy.report.findings import Verdict, verdict
from cushion_deploy.report.terminal import summary, summary_lines
from cushion_deploy.report.write import write_json, write_report

__all__ = ["Report", "Verdict", "read_report", "summary", "summary_lines", "verdict", "write_json", "write_report"]
