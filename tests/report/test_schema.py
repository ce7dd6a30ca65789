"""The JSON Schema of report.json, read by a validator that knows nothing of pydantic."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema_rs
import pytest

from cushion_deploy.report.document import Report

CHANGES: dict[str, Any] = {
    "an unknown field": lambda r: r.update(unknown=1),
    "another version": lambda r: r.update(schema=2),
    "another type": lambda r: r.update(stages="none"),
    "a missing field": lambda r: r.pop("model"),
    "an unknown field inside": lambda r: r["model"].update(colour="red"),
    "a value out of range": lambda r: r["calibration"]["sites"][0].update(scale=-1.0),
    "an unknown word": lambda r: r["parity"][0].update(direction="about"),
}


@pytest.fixture(scope="module")
def validator() -> Any:
    return jsonschema_rs.Draft202012Validator(Report.model_json_schema(mode="serialization"))


def written(report: Report) -> Any:
    return json.loads(report.to_text())


def test_it_accepts_a_report_as_it_is_written(report: Report, validator: Any) -> None:
    assert [error.message for error in validator.iter_errors(written(report))] == []


@pytest.mark.parametrize("change", CHANGES)
def test_it_refuses_what_the_reader_refuses(report: Report, validator: Any, change: str) -> None:
    changed = copy.deepcopy(written(report))
    CHANGES[change](changed)
    assert not validator.is_valid(changed)
    with pytest.raises(ValueError, match=r"\w"):
        Report.model_validate(changed)
