"""The type of plans is stated with its reason, and a plan without fused attention with a warning."""

from __future__ import annotations

from typing import Any

import pytest

from cushion_deploy.report import plans
from cushion_deploy.report.document import PlanType, Report
from cushion_deploy.report.terminal import summary_lines


def value(size: float | None, **more: Any) -> dict[str, Any]:
    place = {"part": "layers.5.mlp", "tensor": "residual", "token": "dog", "token_id": 236858, "position": 40}
    return {**place, "value": size, **more}


def plan_type(dtype: str, wanted: str, *values: dict[str, Any]) -> PlanType:
    return PlanType(dtype=dtype, wanted=wanted, margin=2.0, values=values)  # type: ignore[arg-type]


REACHED = "the residual stream reaches 98,761 in layers.5.mlp at token dog"


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            plan_type("float16", "auto", value(12.0), value(1870.9)),
            "float16: largest value 1,871 of 65,504, where the residual stream reaches 1,871 in layers.5.mlp at token "
            "dog.",
        ),
        (
            plan_type("float16", "float16", value(40_000.0)),
            "float16: largest value 40,000 of 65,504, where the residual stream reaches 40,000 in layers.5.mlp at "
            "token dog, so other text may overflow; set by the recipe.",
        ),
        (
            plan_type("bfloat16", "auto", value(98_761.2), value(3.0)),
            f"bfloat16, because {REACHED}, and float16 ends at 65,504.",
        ),
        (
            plan_type("bfloat16", "auto", value(40_000.0, tensor="a key", part="prefix", token=" ")),
            "bfloat16, because a key reaches 40,000 in prefix at token ␣, and float16 ends at 65,504, less than 2 "
            "times that.",
        ),
        (
            plan_type("bfloat16", "auto", value(7.0), value(None)),
            "bfloat16, because the residual stream reaches infinity in layers.5.mlp at token dog, and float16 ends at "
            "65,504.",
        ),
        (plan_type("float32", "float32"), "float32, set by the recipe."),
    ],
)
def test_the_type_has_its_reason(found: PlanType, sentence: str) -> None:
    assert plans.type_sentence(found) == sentence


def test_a_plan_without_fused_attention_is_warned_about(data: dict[str, Any]) -> None:
    assert not any("warning" in line for line in summary_lines(Report.model_validate(data)))
    for engine in data["engines"]:
        engine["fused_attention"] = 0
    report = Report.model_validate(data)
    text = " ".join(" ".join(summary_lines(report)).split())
    assert "208 of 210 linears are compiled in INT8, attention fused 0 of 30; not run" in text
    assert text.count("warning: no attention of tensorrt-rtx is a fused kernel:") == 1
    assert "210 of 210 linears run in INT8, attention" not in text, "ONNX Runtime fuses none on a CPU"
