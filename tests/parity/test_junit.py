"""The JUnit file says to any XML reader what passed and what failed."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

from cushion_deploy.core.sites import Site
from cushion_deploy.parity.checks import ParityCheck, ParityReport
from cushion_deploy.parity.junit import write_junit


def test_every_check_is_a_case_and_failures_say_what_was_found(tmp_path: Path) -> None:
    checks = (
        ParityCheck("float", "max |logit difference|", 1e-4, 2e-3, "at most", note='after "<bos>" & more'),
        ParityCheck("codes", "identical codes", 0.5, 0.999, "at least", Site("layers.3.mlp.down")),
        ParityCheck("decode", "max |logit difference|", math.nan, 1e-3, "at most"),
        ParityCheck("codes", "largest", 3, 1, "at most"),
    )
    write_junit(ParityReport(checks, "text", 64), tmp_path / "junit.xml")
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    suites = root.findall("testsuite")
    assert len(suites) == 1
    assert (suites[0].get("tests"), suites[0].get("failures"), suites[0].get("errors")) == ("4", "3", "0")
    cases = suites[0].findall("testcase")
    assert [(c.get("classname"), c.get("name")) for c in cases] == [(c.rung, c.metric) for c in checks]
    failures = [c.find("failure") for c in cases]
    assert failures[0] is None
    assert [f.get("message") for f in failures if f is not None] == [
        "0.5, expected at least 0.999; first diverging Site: layers.3.mlp.down",
        "nan, expected at most 0.001",
        "3, expected at most 1",
    ]
    assert cases[0].findtext("system-out") == 'after "<bos>" & more'
    assert cases[1].find("system-out") is None


def test_what_was_not_checked_is_skipped(tmp_path: Path) -> None:
    unchecked = ("tensorrt-rtx was not run: there is no NVIDIA GPU",)
    write_junit(ParityReport((ParityCheck("a", "b", 0, 1, "at most"),), "text", 64, unchecked), tmp_path / "junit.xml")
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert [suite.get(name) for name in ("tests", "skipped", "failures")] == ["2", "1", "0"]
    case = suite.findall("testcase")[1]
    assert (case.get("classname"), case.get("name")) == ("not checked", "tensorrt-rtx was not run")
    (skipped,) = case
    assert (skipped.tag, skipped.get("message")) == ("skipped", unchecked[0])


def test_a_report_without_failures_has_none(tmp_path: Path) -> None:
    write_junit(ParityReport((ParityCheck("a", "b", 0, 1, "at most"),), "text", 64), tmp_path / "junit.xml")
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert list(root.iter("failure")) == []
    assert root.find("testsuite").get("failures") == "0"
