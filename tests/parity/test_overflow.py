"""A sum beyond the range of half fails the rung of the float16 graph, and of no other graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cushion_deploy.calib.calibrate import choose_scales, observe_sites
from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.parity.checks import ParityCheck
from cushion_deploy.parity.ladder import plan_rung
from cushion_deploy.parity.reference import torch_reference
from cushion_deploy.parity.segments import SegmentRun

TOKEN, CHANNEL = 100, 5
"""The token that carries a large value, and its channel of the residual stream."""


def planted(size: float) -> Callable[[Any], None]:
    """Return an edit after which the residual stream of one token grows: ``size``, about 1.7 and then 2.4 times it.

    No term of the sums is above ``size``: the embedding of the token, and what each MLP adds to it.
    """

    def edit(module: Any) -> None:
        module.model.embed_tokens.weight[:, CHANNEL] = 0.0
        module.model.embed_tokens.weight[TOKEN, CHANNEL] = size
        for layer in module.model.layers[:2]:
            # The norm makes the channel sqrt(64) = 8 for this token and 0 for the others; silu(8) * 8 is 64.
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[0] = 0.0
                linear.weight[0, CHANNEL] = 1.0
            layer.mlp.down_proj.weight[CHANNEL] = 0.0
            layer.mlp.down_proj.weight[CHANNEL, 0] = 0.7 * size / 64

    return edit


@pytest.fixture
def rung(tiny_writer: Any, plain_ids: Any, tmp_path: Path) -> Callable[..., list[ParityCheck]]:
    """Return a function that climbs the rung of a model's graph of a type."""

    def climb(size: float, dtype: Any) -> list[ParityCheck]:
        folder = tiny_writer(tmp_path / f"{size}", planted(size))
        model = load_folder(folder, resolve_source(str(folder)))
        prefix, windows = model.compute_prefix((7,)), plain_ids[:256].reshape(4, 64).copy()
        windows[:, 20] = TOKEN
        scales = choose_scales(
            observe_sites(model, prefix, windows, np.ones_like(windows)),
            RangeEstimator("max"),
            model.lineage(prefix, "corpus"),
            windows.size,
        )
        quantization = Quantization(prefix, QuantScheme(), scales)
        given = model.spec, model.weights, quantization
        graphs = [
            export_graph(*given, GraphForm(dtype=kind), tmp_path, name=f"{size}-{kind}") for kind in ("float32", dtype)
        ]
        reference = torch_reference(model, quantization, windows[:1], windows[:1])
        return plan_rung(dtype, reference, *(SegmentRun(graph, scales, "literal") for graph in graphs))

    return climb


def test_a_residual_stream_beyond_half_fails_the_float16_rung(rung: Callable[..., list[ParityCheck]]) -> None:
    checks = rung(45_000.0, "float16")
    assert not all(check.passed for check in checks)
    # The first sum above 65,504 is behind the MLP of layer 0, so what reads it first differs first.
    assert {check.site for check in checks if not check.passed} == {"layers.1.attn.qkv"}
    assert any("not finite" in check.note for check in checks)


@pytest.mark.parametrize(("size", "dtype"), [(25_000.0, "float16"), (45_000.0, "bfloat16"), (45_000.0, "float32")])
def test_a_residual_stream_in_range_holds(size: float, dtype: str, rung: Callable[..., list[ParityCheck]]) -> None:
    checks = rung(size, dtype)
    assert [check.passed for check in checks] == [True, True, True], [check.note for check in checks]
