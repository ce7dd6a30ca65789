"""The graph with an INT8 cache is transformers with a simulated one: the same codes, the same logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.kv_scales import KvScales, kv_site
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.errors import UsageError
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.simulate import quantized_cache

TOKENS = (7, 1, 100)
CACHE = {kv_site(i, part) for i in range(2) for part in ("key", "value")}


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(3).integers(3, 199, (1, 20))


def simulated_logits(model: Any, kv: KvScales, row: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return logits and the keys and values of the row, layer by layer, of torch."""
    past = model.past(model.compute_prefix(TOKENS))
    with torch.inference_mode(), quantized_cache(model, kv):
        out = model.run(torch.from_numpy(row), past, keep_cache=True)
    states = [
        s[:, :, len(TOKENS) :].numpy() for layer in out.past_key_values.layers for s in (layer.keys, layer.values)
    ]
    return out.logits.numpy(), states


def begin(graph: ExportedGraph, kv: KvScales, model: Any) -> dict[str, np.ndarray]:
    """Return the first past: nothing, or the codes of the prefix as numpy rounds them."""
    prefix = model.compute_prefix(TOKENS)
    past = {}
    for i in range(model.spec.num_layers):
        for part, floats, steps in (("key", prefix.keys, kv.keys), ("value", prefix.values, kv.values)):
            codes = np.clip(np.rint(floats[i] / steps[i][:, None, None]), -128, 127).astype(np.int8)
            past[f"past_key_values.{i}.{part}"] = codes[None, :, : graph.contract.prefix_slots]
    return past


@pytest.mark.parametrize("granularity", ["per-head", "per-tensor"])
@pytest.mark.parametrize("cached", [False, True], ids=["baked", "cache"])
def test_codes_and_logits_are_those_of_torch_at_once_and_in_pieces(
    granularity: str, cached: bool, export_cached, make_model, runner, ids
) -> None:
    graph, kv = export_cached(granularity, cached=cached)
    model, session = make_model(), runner(graph.path)
    expected, states = simulated_logits(model, kv, ids)
    past = begin(graph, kv, model)
    slots = graph.contract.prefix_slots
    # Positions and mask of the runner count what lies in the past.
    logits, present = session(ids, past)
    assert np.abs(logits - expected).max() <= 1e-4
    for i, state in enumerate(states):
        codes = present[f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}"]
        assert codes.dtype == np.int8
        steps = (kv.keys, kv.values)[i % 2][i // 2][:, None, None]
        np.testing.assert_array_equal(codes[:, :, slots:], np.rint(state / steps))
    parts = []
    for start, end in ((0, 9), (9, 10), (10, 20)):
        found, past = session(ids[:, start:end], past)
        parts.append(found)
    assert np.abs(np.concatenate(parts, axis=1) - expected).max() <= 1e-4


def test_left_padding_changes_nothing(export_cached, make_model, runner, ids) -> None:
    graph, kv = export_cached()
    batch = np.stack([ids[0], np.r_[[0] * 6, ids[0, 6:]]])
    mask = (np.arange(20) >= np.array([[0], [6]])).astype(np.int64)
    logits, _ = runner(graph.path)(batch, mask=mask)
    for row, start in enumerate((0, 6)):
        expected, _ = simulated_logits(make_model(), kv, ids[:, start:])
        assert np.abs(logits[row, start:] - expected[0]).max() <= 1e-4


@pytest.mark.parametrize("granularity", ["per-head", "per-tensor"])
def test_float16_is_close_and_quantizes_in_float32(granularity: str, export_cached, make_model, runner, ids) -> None:
    graph, kv = export_cached(granularity, dtype="float16")
    expected, _ = simulated_logits(make_model(), kv, ids)
    logits, present = runner(graph.path)(ids)
    assert {codes.dtype for codes in present.values()} == {np.dtype(np.int8)}
    # A code that half moves over a tie moves a logit too.
    assert np.abs(logits - expected).max() <= 0.02 * np.abs(expected).max()
    stored = {t.name: t.data_type for t in onnx.load(graph.path).graph.initializer}
    assert {stored[f"{site}.scale"] for site in CACHE} == {TensorProto.FLOAT}


@pytest.mark.parametrize("opset", [17, 19, 21, 22])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_checker_accepts_it_and_its_contract_says_int8(opset: int, dtype: str, export_cached) -> None:
    graph, _ = export_cached(opset=opset, dtype=dtype)
    onnx.checker.check_model(graph.path, full_check=True)
    written = onnx.load(graph.path, load_external_data=False).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*written.input, *written.output)}
    caches = [kind for name, kind in types.items() if name.startswith(("past", "present"))]
    assert caches == [TensorProto.INT8] * 8
    assert graph.contract.cache_dtype == "int8"
    assert graph.contract.dtype == dtype
    assert [file.name for file in graph.files] == ["model.onnx", "model.onnx.data", "kv_scales.json"]
    assert ExportedGraph.from_json(graph.to_json(), graph.path.parent) == graph


def test_a_floating_point_cache_leaves_no_trace(export_float, make_model) -> None:
    graph = export_float(make_model(), TOKENS)
    assert not graph.path.with_name("kv_scales.json").exists()
    assert "quantized_cache" not in graph.to_json()["contract"]
    assert graph.lineage.kv_scales == ""
    assert graph.contract.cache_dtype == "float32"


def test_scales_of_something_else_are_refused(cache_scales, make_model, tmp_path: Path) -> None:
    model = make_model()
    prefix = model.compute_prefix(TOKENS)
    good = cache_scales(model, prefix)

    def export(kv: KvScales, form: GraphForm) -> None:
        quantization = Quantization(prefix, QuantScheme(), kv_scales=kv)
        export_graph(model.spec, model.weights, quantization, form, tmp_path)

    for kv, form, words in (
        (replace(good, lineage=replace(good.lineage, model="other")), {}, "another model"),
        (replace(good, keys=good.keys[:1], values=good.values[:1]), {}, "another model"),
        (replace(good, lineage=replace(good.lineage, prefix="other")), {}, "another prefix"),
        (replace(good, lineage=replace(good.lineage, smoothing="other")), {}, "another smoothing"),
        (replace(good, with_prefix=True), {}, "for a prefix in the cache, but it is inside the graph"),
        (good, {"prefix": "cache"}, "for a prefix inside the graph, but it is in the cache"),
    ):
        with pytest.raises(UsageError, match=words):
            export(kv, GraphForm(quantized=False, cache="int8", **form))
        assert not list(tmp_path.iterdir()), "nothing may be written"
