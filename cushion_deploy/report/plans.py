"""What is said of compiled engines: the floating-point type of plans, and how many attentions are fused."""

from __future__ import annotations

from cushion_deploy.printable import one_line, visible
from cushion_deploy.report.document import Engine, LargestValue, PlanType, Report

HALF_MAX = 65504.0
"""Largest finite value of float16."""


def fuses_attention(engine: Engine) -> bool:
    """Whether an engine is made of fused kernels; ONNX Runtime fuses no attention on a CPU."""
    return engine.engine.startswith("tensorrt")


def attention_words(report: Report, engine: Engine) -> str:
    """Return how many attentions of an engine are fused: ``attention fused 30 of 30``; empty for ONNX Runtime."""
    return f"attention fused {engine.fused_attention} of {report.model.layers}" if fuses_attention(engine) else ""


def attention_warning(report: Report, engine: Engine) -> str:
    """Return a warning about an engine without any fused attention; empty if there is one."""
    if not fuses_attention(engine) or engine.fused_attention or not report.model.layers:
        return ""
    why = " (no float32 plan has one)" if engine.details.get("dtype") == "float32" else ""
    return (
        f"warning: no attention of {one_line(engine.engine)} is a fused kernel{why}: every layer writes all scores to "
        "memory and reads them again, which takes time in long contexts"
    )


def reaches(found: LargestValue) -> str:
    """Return what reaches which value, where, at which token."""
    what = "the residual stream" if found.tensor == "residual" else one_line(found.tensor)
    size = "infinity" if found.value is None else f"{found.value:,.0f}"
    return f"{what} reaches {size} in {one_line(found.part)} at token {visible(found.token)}"


def type_sentence(plan: PlanType) -> str:
    """State which floating-point type plans have, and why."""
    found = plan.largest
    if found is None:
        return f"{plan.dtype}, set by the recipe."
    if plan.dtype == "float16":
        size = 0.0 if found.value is None else found.value
        text = f"float16: largest value {size:,.0f} of {HALF_MAX:,.0f}, where {reaches(found)}"
        narrow = "" if size * plan.margin <= HALF_MAX else ", so other text may overflow; set by the recipe"
        return f"{text}{narrow}."
    beyond = found.value is None or found.value > HALF_MAX
    limit = f"float16 ends at {HALF_MAX:,.0f}" + ("" if beyond else f", less than {plan.margin:g} times that")
    return f"{plan.dtype}, because {reaches(found)}, and {limit}."
