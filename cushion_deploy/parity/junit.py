"""Write a parity report as JUnit XML: a test case per check, and a skipped one for what could not be checked."""

from __future__ import annotations

from pathlib import Path

from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

from cushion_deploy.parity.checks import ParityReport
from cushion_deploy.store.files import temporary_folder, write_file


def write_junit(report: ParityReport, path: Path) -> None:
    """Write the report as JUnit XML, which CI systems read as test results."""
    suite = TestSuite("cushion-deploy parity")
    for check in report.checks:
        case = TestCase(check.metric, classname=check.rung)
        if not check.passed:
            words = f"{check.value:g}, expected {check.direction} {check.limit:g}"
            where = f"; first diverging Site: {check.site}" if check.site else ""
            case.result = [Failure(f"{words}{where}", "parity")]
        if check.note:
            case.system_out = check.note
        suite.add_testcase(case)
    for sentence in report.unchecked:
        case = TestCase(sentence.partition(":")[0], classname="not checked")
        case.result = [Skipped(sentence)]
        suite.add_testcase(case)
    xml = JUnitXml()
    xml.add_testsuite(suite)
    with temporary_folder("cushion-junit-") as folder:
        xml.write(str(folder / "report.xml"), pretty=True)
        write_file(path, (folder / "report.xml").read_bytes())
