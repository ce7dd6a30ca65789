"""A baseline catches what became worse within its limit, lets noise pass, and is no baseline when it is damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cushion_deploy.core.sites import Site
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.parity.baseline import compare_baseline, read_baseline, write_baseline
from cushion_deploy.parity.checks import ParityCheck, ParityReport

SITE = Site("layers.3.mlp.down")
CHECKS = (
    ParityCheck("float", "max |logit difference|", 6e-5, 2e-3, "at most"),
    ParityCheck("codes", "identical INT8 codes, lowest Site", 0.9999, 0.999, "at least", SITE),
    ParityCheck("decode", "largest difference", 0.0, 1e-3, "at most"),
)
REPORT = ParityReport(CHECKS, "text", 100)


def compared(tmp_path: Path, position: int, value: float) -> ParityCheck:
    """Return the baseline's check of a report in which one value has moved."""
    write_baseline(REPORT, tmp_path / "baseline.json")
    moved = list(CHECKS)
    moved[position] = replace(moved[position], value=value)
    report = compare_baseline(ParityReport(tuple(moved), "text", 100), read_baseline(tmp_path / "baseline.json"))
    assert report.checks[: len(CHECKS)] == tuple(moved)
    assert all(check.rung.startswith("baseline: ") for check in report.checks[len(CHECKS) :])
    others = [c for i, c in enumerate(report.checks[len(CHECKS) :]) if i != position]
    assert all(check.passed for check in others)
    return report.checks[len(CHECKS) + position]


@pytest.mark.parametrize(
    ("position", "value", "passes"),
    [
        (0, 6e-5, True),
        (0, 0.0, True),
        (0, 9e-5, True),
        (0, 5e-4, False),
        (1, 0.9999, True),
        (1, 1.0, True),
        (1, 0.99986, True),
        (1, 0.9995, False),
        (2, 1e-5, True),
        (2, 1e-4, False),
    ],
)
def test_what_became_worse_fails_though_its_limit_holds(
    position: int, value: float, passes: bool, tmp_path: Path
) -> None:
    check = compared(tmp_path, position, value)
    assert check.passed is passes
    assert check.site == CHECKS[position].site
    assert f"{CHECKS[position].value:g}" in check.note


def test_a_check_that_is_gone_fails(tmp_path: Path) -> None:
    write_baseline(REPORT, tmp_path / "baseline.json")
    fewer = ParityReport(CHECKS[:2], "text", 100)
    report = compare_baseline(fewer, read_baseline(tmp_path / "baseline.json"))
    assert not report.passed
    assert "the report does not" in report.checks[-1].note


def test_an_edited_tolerance_counts(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    write_baseline(REPORT, file)
    text = json.loads(file.read_text())
    text["checks"][0]["tolerance"] = 0.0
    file.write_text(json.dumps(text))
    worse = ParityReport((replace(CHECKS[0], value=6.1e-5), *CHECKS[1:]), "text", 100)
    assert not compare_baseline(worse, read_baseline(file)).passed
    assert compare_baseline(REPORT, read_baseline(file)).passed


def test_no_baseline_is_written_of_a_failure(tmp_path: Path) -> None:
    failing = ParityReport((replace(CHECKS[1], value=0.5),), "text", 100)
    with pytest.raises(UsageError, match="identical INT8 codes"):
        write_baseline(failing, tmp_path / "baseline.json")
    assert not (tmp_path / "baseline.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"schema": 2, "checks": []}',
        '{"schema": 1}',
        '{"schema": 1, "checks": [{"rung": "a", "metric": "b", "value": NaN, "tolerance": 0}]}',
        '{"schema": 1, "checks": [{"rung": "a", "metric": "b", "value": 1, "tolerance": -1}]}',
    ],
)
def test_what_is_no_baseline_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "baseline.json").write_text(text)
    with pytest.raises(UntrustedArtifact, match="is not a baseline"):
        read_baseline(tmp_path / "baseline.json")


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_baseline(tmp_path / "nothing.json")
