"""The ladder over an INT8 cache: an intact one passes, and a wrong scale is found at its own place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.calib.kv_cache import choose_kv_scales, observe_cache
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.kv_scales import KvScales, kv_site
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.export.write import export_graph
from cushion_deploy.parity.ladder import plan_rung, segment_decode_rung, segment_rung
from cushion_deploy.parity.reference import torch_reference
from cushion_deploy.parity.segments import SegmentRun
from cushion_deploy.parity.stored_values import cache_scale_rung
from cushion_deploy.parity.torch_results import TorchReference

SITE = kv_site(1, "value")


@dataclass(frozen=True)
class Cached:
    """The deployed tiny model with an INT8 cache."""

    kv: KvScales
    graph: ExportedGraph
    half: ExportedGraph
    reference: TorchReference


@pytest.fixture(scope="module", params=["per-head baked", "per-tensor cache"])
def cached(
    deployed: Any, plain_ids: np.ndarray, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Cached:
    granularity, where = request.param.split()
    d, in_cache = deployed, where == "cache"
    windows = plain_ids[:512].reshape(8, 64)
    kv = choose_kv_scales(
        observe_cache(d.model, d.prefix, windows, np.ones_like(windows), granularity), RangeEstimator("max"),
        granularity, d.prefix, d.model.lineage(d.prefix, "corpus"), 512, with_prefix=in_cache,
    )  # fmt: skip
    quantization = Quantization(d.prefix, d.scheme, d.scales, kv_scales=kv)
    form = GraphForm(cache="int8", prefix=where)
    graphs = [
        export_graph(d.model.spec, d.model.weights, quantization, replace(form, dtype=dtype), folder)
        for dtype in ("float32", "float16")
        for folder in [tmp_path_factory.mktemp("cached")]
    ]
    reference = torch_reference(d.model, quantization, d.reference.ids, windows[:2])
    return Cached(kv, *graphs, reference)


@pytest.mark.parametrize("kernels", ["literal", "fused"])
def test_an_intact_cache_passes_every_segment(kernels: Any, cached: Cached, deployed: Any) -> None:
    run = SegmentRun(cached.graph, deployed.scales, kernels)
    checks = segment_rung("segments", cached.reference, run) + segment_decode_rung("decode", cached.reference, run, 5)
    assert [check for check in checks if not check.passed] == []
    # 13 Sites, keys and values of three layers.
    assert f"{13 + 6} Sites" in checks[0].note


def test_the_float16_graph_is_near(cached: Cached, deployed: Any) -> None:
    runs = [SegmentRun(graph, deployed.scales, "literal") for graph in (cached.graph, cached.half)]
    assert [check for check in plan_rung("half", cached.reference, *runs) if not check.passed] == []


def test_the_cache_matters_to_the_reference(cached: Cached, deployed: Any) -> None:
    floats, codes = deployed.reference.quantized_logits, cached.reference.quantized_logits
    assert np.abs(floats - codes).max() > 1e-2
    assert set(cached.reference.codes) - set(deployed.reference.codes) == {
        kv_site(i, part) for i in range(3) for part in ("key", "value")
    }


def test_the_last_bit_of_a_scale_is_named_at_its_own_place(
    cached: Cached, deployed: Any, sabotaged: Callable[..., ExportedGraph]
) -> None:
    for graph in (cached.graph, cached.half):
        (check,) = cache_scale_rung("rung", graph, cached.kv)
        assert (check.passed, check.note) == (True, "6 parts compared bit for bit")

    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{SITE}.scale"] = np.nextafter(tensors[f"{SITE}.scale"], np.float32(np.inf))

    (check,) = cache_scale_rung("rung", sabotaged(cached.graph, edit), cached.kv)
    assert (check.passed, check.value, check.site) == (False, 1, SITE)
    other = replace(cached.kv, keys=cached.kv.keys * np.float32([[1], [1], [1.5]]))
    (check,) = cache_scale_rung("rung", cached.graph, other)
    assert (check.value, check.site) == (1, kv_site(2, "key"))
    (check,) = cache_scale_rung("rung", deployed.graph, cached.kv)
    assert check.value == 6, "a floating-point cache has none"


def test_a_segment_starts_from_the_codes_that_are_in_the_cache(cached: Cached, deployed: Any) -> None:
    reference, run = cached.reference, SegmentRun(cached.graph, deployed.scales, "literal")
    forced = {site: codes.copy() for site, codes in reference.codes.items()}
    forced[SITE][:] = 0
    _, codes, present = run(reference.ids, forced)
    slots = cached.graph.contract.prefix_slots
    assert not present["present.1.value"][:, :, slots:].any()
    assert np.array_equal(codes[SITE], reference.codes[SITE]), "what would enter it is untouched"
    assert not np.array_equal(codes["layers.1.attn.out"], reference.codes["layers.1.attn.out"])
