"""The rungs that read a graph Site by Site take a static cache as they take one that grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.export.write import export_graph
from cushion_deploy.parity.compare import compare_codes, compare_logits
from cushion_deploy.parity.ladder import plan_rung
from cushion_deploy.parity.limits import CODE_DIFFERENCE, IDENTICAL_CODES
from cushion_deploy.parity.segments import SegmentRun

LENGTH = 64
"""Of the reference text."""


@pytest.fixture
def static(deployed: Any, tmp_path: Path) -> Any:
    """Return a function that exports the deployed model with a static cache of some tokens behind the prefix."""

    def export(tokens: int, dtype: str = "float16") -> ExportedGraph:
        d = deployed
        quantization = Quantization(d.prefix, d.scheme, d.scales)
        form = GraphForm(dtype=dtype, cache="static", capacity=d.prefix.length + tokens, prefix="cache")
        return export_graph(d.model.spec, d.model.weights, quantization, form, tmp_path)

    return export


def half_checks(deployed: Any, half: ExportedGraph) -> dict[str, Any]:
    runs = (SegmentRun(graph, deployed.scales, "literal") for graph in (deployed.graph, half))
    return {check.metric: check for check in plan_rung("half", deployed.reference, *runs)}


@pytest.mark.parametrize("tokens", [LENGTH, 100, 40])
def test_the_plan_rung_holds_for_a_cache_of_any_capacity(tokens: int, deployed: Any, static: Any) -> None:
    checks = half_checks(deployed, static(tokens))
    assert [check.passed for check in checks.values()] == [True, True, True]
    growing = half_checks(deployed, deployed.half)
    assert set(checks) == set(growing)
    for metric, check in checks.items():
        # The same roundings as in a growing cache; ONNX Runtime adds them up in another order.
        assert check.value == pytest.approx(growing[metric].value, rel=0.05, abs=1e-3) or metric.startswith("largest")


def test_the_plan_rung_names_the_site_behind_a_fault(deployed: Any, static: Any, sabotaged: Any) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors["layers.1.attn.qkv.weight_scales"] = tensors["layers.1.attn.qkv.weight_scales"] * np.float32(1.3)

    checks = half_checks(deployed, sabotaged(static(LENGTH), edit))
    assert {check.site for check in checks.values() if not check.passed} == {"layers.1.attn.out"}


def test_single_tokens_behind_a_past_are_the_whole_text(deployed: Any, static: Any) -> None:
    reference, run = deployed.reference, SegmentRun(static(LENGTH, "float32"), deployed.scales, "literal")
    logits, codes, present = run(reference.ids, reference.codes)
    for distance in compare_codes(reference.codes, codes).values():
        assert distance.identical >= IDENTICAL_CODES
        assert distance.largest <= CODE_DIFFERENCE
    assert compare_logits(reference.quantized_logits, logits).maximum <= 1e-3
    slots = deployed.prefix.length
    assert {value.shape[2] for value in present.values()} == {slots + LENGTH}
    for t in (1, 30, LENGTH - 1):
        past = {name.replace("present", "past_key_values"): v[:, :, : slots + t] for name, v in present.items()}
        row = {site: c[:, t : t + 1] for site, c in reference.codes.items()}
        step, _, grown = run(reference.ids[:, t : t + 1], row, past)
        assert compare_logits(logits[:, t : t + 1], step).maximum <= 1e-4
        for name, value in grown.items():
            np.testing.assert_allclose(value, present[name][:, :, : slots + t + 1], atol=1e-4)
