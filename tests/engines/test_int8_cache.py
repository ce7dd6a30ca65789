"""Sessions over an INT8 cache: ONNX Runtime, and TensorRT on a device that checks every call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu import FakeTensorRt
from fake_plans import close, plan_of

from cushion_deploy.core.artifacts import read_kv_scales, write_kv_scales
from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.kv_scales import KV_SCALES_FILE, KvScales
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.session import first_caches
from cushion_deploy.engines.onnxruntime.session import OnnxRuntimeSession, open_session
from cushion_deploy.engines.tensorrt.engine import TensorRt
from cushion_deploy.engines.tensorrt.flavours import RTX
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.simulate import quantized_cache


def made_up(tiny: Any) -> KvScales:
    spec, cached = tiny.loaded.spec, tiny.graph.contract.prefix_in_cache
    shape = (spec.num_layers, spec.num_kv_heads)
    keys = (0.05 * (1 + np.arange(np.prod(shape)).reshape(shape) / 4)).astype(np.float32)
    parents = ("per-head", "max", Lineage(spec.weights_digest, tiny.prefix.digest, text="c"), 1)
    return KvScales(keys, (keys / 2).astype(np.float32), *parents, with_prefix=cached)


@pytest.fixture(scope="module", params=["float32", "float16"])
def graph(tiny: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    """Return the tiny model's graph with an INT8 cache, prefix in the graph and in the cache."""
    loaded, folder = tiny.loaded, tmp_path_factory.mktemp("int8")
    quantization = Quantization(tiny.prefix, QuantScheme(), kv_scales=made_up(tiny))
    form = GraphForm(dtype=request.param, quantized=False, cache="int8", prefix=tiny.graph.contract.prefix_mode)
    return export_graph(loaded.spec, loaded.weights, quantization, form, folder)


FLOAT32 = pytest.mark.parametrize("graph", ["float32"], indirect=True)


@pytest.fixture
def expected(tiny: Any, ids: np.ndarray) -> np.ndarray:
    """Return the logits of torch with a simulated cache, ``[1, n, vocab]``."""
    past = tiny.loaded.past(tiny.prefix)
    with torch.inference_mode(), quantized_cache(tiny.loaded, made_up(tiny)):
        logits: np.ndarray = tiny.loaded.run(torch.from_numpy(ids), past).logits.numpy()
    return logits


@FLOAT32
def test_a_prompt_in_pieces_is_the_row_of_torch(graph: ExportedGraph, ids: np.ndarray, expected: np.ndarray) -> None:
    session = open_session(graph, threads=1, chunk=7)
    found = session.run(ids[:, :30], need_logits="all")
    steps = [session.run(ids[:, i : i + 1]) for i in range(30, 40)]
    assert np.abs(np.concatenate([found, *steps], axis=1) - expected).max() <= 1e-3
    assert session.length == 40


@FLOAT32
def test_truncating_and_a_batch(graph: ExportedGraph, ids: np.ndarray, expected: np.ndarray) -> None:
    session = open_session(graph, threads=1)
    session.run(np.concatenate([ids, ids[:, ::-1]]), need_logits="none")
    session.truncate(11)
    rows = session.run(np.concatenate([ids[:, 11:20]] * 2), need_logits="all")
    assert np.abs(rows[0] - expected[0, 11:20]).max() <= 1e-3
    session.reset()
    assert np.abs(session.run(ids[:, :5], need_logits="all") - expected[:, :5]).max() <= 1e-3


@FLOAT32
def test_the_scales_of_another_graph_are_refused(graph: ExportedGraph, tiny: Any, tmp_path: Path) -> None:
    for file in graph.files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    scales = read_kv_scales(tmp_path / KV_SCALES_FILE)
    write_kv_scales(replace(scales, keys=scales.keys * 2), tmp_path / KV_SCALES_FILE)
    with pytest.raises(UntrustedArtifact, match="was made with other cache scales"):
        open_session(replace(graph, path=tmp_path / "model.onnx"))
    if graph.contract.prefix_slots:
        with pytest.raises(UsageError, match="its scales are missing"):
            OnnxRuntimeSession(graph.path, graph.contract, prefix=tiny.prefix)
    floating = replace(graph.contract, quantized_cache=False)
    prefix = tiny.prefix if graph.contract.prefix_slots else None
    with pytest.raises(UntrustedArtifact, match="not the graph that its contract describes"):
        OnnxRuntimeSession(graph.path, floating, prefix=prefix)


@FLOAT32
def test_every_cache_begins_with_the_codes_of_the_prefix(graph: ExportedGraph, tiny: Any) -> None:
    kv, slots = made_up(tiny), graph.contract.prefix_slots
    first = first_caches(graph.contract, tiny.prefix if slots else None, 2, kv)
    assert [array.shape for array in first] == [(2, kv.keys.shape[1], slots, graph.contract.head_dim)] * len(first)
    assert {array.dtype for array in first} == {np.dtype(np.int8)}
    if slots:
        codes = np.clip(np.rint(tiny.prefix.values[1] / kv.values[1][:, None, None]), -128, 127)
        np.testing.assert_array_equal(first[3], np.stack([codes, codes]))


def test_a_plan_keeps_codes_on_the_device(
    graph: ExportedGraph,
    tiny: Any,
    device: FakeTensorRt,
    ids: np.ndarray,
) -> None:
    reference = open_session(graph, threads=1)
    with TensorRt(RTX).open(graph, plan_of(graph)) as session:
        assert session.contract.cache_dtype == "int8"
        close(session.run(ids[:, :20], need_logits="all"), reference.run(ids[:, :20], need_logits="all"))
        for i in range(20, 24):
            close(session.run(ids[:, i : i + 1]), reference.run(ids[:, i : i + 1]))
        session.truncate(9)
        reference.truncate(9)
        close(session.run(ids[:, 9:12]), reference.run(ids[:, 9:12]))
        c = session.contract
        # Two sets of keys and values of each layer, for the largest batch and total; one byte a value.
        size = 3 * c.num_kv_heads * (59 + c.prefix_slots + 8) * c.head_dim
        assert [len(data) for data in device.cuda.memory.values()].count(size) == 2 * 2 * c.num_layers
    assert not device.cuda.memory


def test_a_plan_with_another_cache_is_refused(graph: ExportedGraph, device: FakeTensorRt, tiny: Any) -> None:
    other = replace(graph, contract=replace(graph.contract, quantized_cache=False))
    with pytest.raises(UntrustedArtifact, match="keeps its cache as INT8"):
        TensorRt(RTX).open(other, plan_of(graph))
    assert not device.cuda.memory
