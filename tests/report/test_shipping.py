"""The answer to 'can I ship it?' comes from the checks, and says what is missing."""

from __future__ import annotations

from typing import Any

import pytest

from cushion_deploy.report import summary_lines
from cushion_deploy.report.document import Report
from cushion_deploy.report.shipping import answer, reasons


def states(report: Report) -> list[tuple[str, str]]:
    return [(reason.name, reason.status) for reason in reasons(report)]


def test_a_bundle_with_every_proof_may_ship_if_its_accuracy_is_enough(report: Report) -> None:
    assert answer(report).startswith("Yes, if this accuracy is enough")
    assert {status for _, status in states(report)} == {"passed"}
    said = {reason.name: reason.sentence for reason in reasons(report)}
    # 31.6 / 29.6 = 1.0676.
    assert "Perplexity 31.60, 29.60 in floating point without a prefix (+6.8 %)" in said["Accuracy"]
    assert "210 of 210 linears run in INT8 (onnxruntime)" in said["INT8"]
    assert "tensorrt-rtx was compiled but not run here" in said["Engines"]


def test_accuracy_is_that_of_the_column_that_ships(data: dict[str, Any]) -> None:
    data["choice"] |= {"shipped": "without prefix"}
    # 63.23 / 29.6 = 2.1361.
    accuracy = next(reason for reason in reasons(Report.model_validate(data)) if reason.name == "Accuracy")
    assert "Perplexity 63.23, 29.60 in floating point without a prefix (+114 %)" in accuracy.sentence


def test_one_failed_check_is_a_no_whatever_else_holds(data: dict[str, Any]) -> None:
    data["parity"][2].update(value=0.9971, passed=False, site="layers.3.mlp.down")
    report = Report.model_validate(data)
    assert answer(report).startswith("No: 1 of 7 parity checks fails")
    assert states(report)[0] == ("Computes what was evaluated", "failed")
    assert "layers.3.mlp.down" in reasons(report)[0].sentence
    lines = " ".join(" ".join(summary_lines(report)).split())
    assert lines.startswith("Do not ship: 1 of 7 parity checks fails at layers.3.mlp.down.")
    assert lines.index("No: 1 of 7") < lines.index("standard error")


@pytest.mark.parametrize(
    ("section", "value", "words", "reason"),
    [
        ("parity", [], "the parity ladder was not run", "Computes what was evaluated"),
        ("engines", [], "no engine ran on this machine", "Engines"),
        ("perplexity", None, "its perplexity was not measured", "Accuracy"),
    ],
)
def test_what_is_missing_is_a_not_yet(data: dict[str, Any], section: str, value: Any, words: str, reason: str) -> None:
    data[section] = value
    report = Report.model_validate(data)
    assert answer(report) == f"Not yet: {words}."
    assert (reason, "incomplete") in states(report)
    assert next(r.result for r in reasons(report) if r.name == reason).startswith("not ")


def test_numbers_that_are_not_finite_are_no_accuracy(data: dict[str, Any]) -> None:
    data["perplexity"].update(quantized_prefix=None, kl_after_16=None)
    data["chat"] = None
    report = Report.model_validate(data)
    assert ("Accuracy", "incomplete") in states(report)
    assert next(r.sentence for r in reasons(report) if r.name == "Accuracy") == "Not finite."
