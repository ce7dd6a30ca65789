"""report.json: what is kept through a round trip, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cushion_deploy.errors import UntrustedArtifact
from cushion_deploy.report.document import ParityRow, Report, read_report


def test_json_written_is_the_json_read(data: dict[str, Any]) -> None:
    text = Report.model_validate_json(json.dumps(data)).model_dump_json()
    assert json.loads(text) == data
    assert Report.model_validate_json(text).model_dump_json() == text


def test_sections_that_were_not_run_may_be_missing(data: dict[str, Any]) -> None:
    minimal = {key: data[key] for key in ("schema", "tool", "created", "model", "precision")}
    written = json.loads(Report.model_validate(minimal).to_text())
    assert written["perplexity"] is None
    assert written["parity"] == []
    assert list(written) == list(data)


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("where", [("perplexity", "fp"), ("search", "seconds"), ("recipe", "alpha")])
def test_numbers_that_json_cannot_spell_are_refused(data: dict[str, Any], bad: str, where: tuple[str, str]) -> None:
    data[where[0]][where[1]] = float(bad)
    with pytest.raises(ValidationError):
        Report.model_validate_json(json.dumps(data))


def test_non_finite_number_deep_inside_engine_details_is_refused(data: dict[str, Any]) -> None:
    data["engines"][0]["details"] = {"kernels": [{"seconds": float("nan")}]}
    with pytest.raises(ValidationError, match="finite number"):
        Report.model_validate_json(json.dumps(data))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "layers", -1),
        ("perplexity", "fp", 0.0),
        ("perplexity", "surprise", 1),
        ("search", "tokens", ["only one"]),
    ],
)
def test_values_without_meaning_are_refused(data: dict[str, Any], section: str, key: str, value: Any) -> None:
    data[section][key] = value
    with pytest.raises(ValidationError):
        Report.model_validate(data)


def test_creation_time_needs_a_time_zone(data: dict[str, Any]) -> None:
    data["created"] = "2026-03-14T09:26:53"
    with pytest.raises(ValidationError, match="timezone"):
        Report.model_validate(data)


@given(
    value=st.floats(-10, 10),
    limit=st.floats(-10, 10),
    direction=st.sampled_from(["at most", "at least"]),
    passed=st.booleans(),
)
def test_a_parity_verdict_must_follow_from_its_numbers(
    value: float, limit: float, direction: Any, passed: bool
) -> None:
    holds = {"at most": not value > limit, "at least": not value < limit}[direction]
    row = {"rung": "r", "metric": "m", "value": value, "limit": limit, "direction": direction, "passed": passed}
    if passed == holds:
        assert ParityRow.model_validate(row).passed is holds
    else:
        with pytest.raises(ValidationError, match="contradicts"):
            ParityRow.model_validate(row)


def test_a_value_that_was_not_finite_cannot_pass_an_upper_limit() -> None:
    row = {"rung": "r", "metric": "m", "value": None, "limit": 1.0, "direction": "at most", "passed": True}
    with pytest.raises(ValidationError, match="contradicts"):
        ParityRow.model_validate(row)


def test_a_report_cannot_be_changed(report: Report) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        report.precision = "w4a4"


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2}', "{"])
def test_a_file_that_is_no_report_is_untrusted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(UntrustedArtifact, match="is not a report of schema 1") as caught:
        read_report(path)
    assert "cushion-deploy verify" in caught.value.hint


def test_a_missing_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(UntrustedArtifact, match=r"gone\.json cannot be read"):
        read_report(tmp_path / "gone.json")


def test_reading_returns_what_was_written(tmp_path: Path, report: Report) -> None:
    path = tmp_path / "report.json"
    path.write_text(report.to_text(), encoding="utf-8")
    assert read_report(path) == report
