"""The graph of a provider that is slow in INT8: products in float16, with the codes and quantizers of the bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper, shape_inference

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.engines.onnxruntime.compile_graph import compile_graph, require_same_bundle
from cushion_deploy.engines.onnxruntime.engine import OnnxRuntime
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.engines.onnxruntime.settings import CPU, CUDA, SessionSettings, session_options
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import CheckFailed
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.report.document.build import Engine
from cushion_deploy.report.statements import coverage
from cushion_deploy.runtime.bundle import read_graph
from cushion_deploy.stages.compile import CompiledEngine
from cushion_deploy.stages.report import engine_row

HERE = replace(CPU, device="cpu", multiplies_floats=True)
"""The settings of ``onnxruntime-cuda`` on the processor that every machine has."""
SCHEME = QuantScheme()


def quantization_of(model: TorchRunner) -> Quantization:
    """Return a quantization behind a prefix of two tokens."""
    prefix = model.compute_prefix((7, 1))
    parents = Lineage(model.spec.weights_digest, prefix.digest, text="none")
    scales = ActivationScales(dict.fromkeys(model.sites, 0.05), "max", parents, tokens=1)
    return Quantization(prefix, SCHEME, scales)


@pytest.fixture(scope="module")
def graphs(tiny_model: TorchRunner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportedGraph]:
    """Return the quantized graph of the tiny model in float32 and float16."""
    found = {}
    for dtype in ("float32", "float16"):
        folder, form = tmp_path_factory.mktemp(dtype), GraphForm(dtype=dtype)
        found[dtype] = export_graph(tiny_model.spec, tiny_model.weights, quantization_of(tiny_model), form, folder)
    return found


@pytest.fixture(scope="module")
def own(graphs: dict[str, ExportedGraph], tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    """Return the graph that is compiled from the float16 one."""
    folder = tmp_path_factory.mktemp("own")
    compile_graph(graphs["float16"], folder, CUDA)
    return read_graph(folder)


def products(path: Path) -> list[tuple[onnx.NodeProto, set[int]]]:
    """Return the products of a graph with a DQ among the ancestors of both inputs, and the types of these inputs."""
    model = shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input)}
    producers = {node.output[0]: node for node in model.graph.node}

    def dequantized(name: str) -> bool:
        node = producers.get(name)
        return node is not None and (
            node.op_type == "DequantizeLinear" or (node.op_type == "Cast" and dequantized(node.input[0]))
        )

    found = [node for node in model.graph.node if node.op_type == "MatMul" and all(map(dequantized, node.input))]
    return [(node, {types[name] for name in (*node.input, *node.output)}) for node in found]


def test_every_quantized_product_is_float16_and_everything_else_is_kept(
    graphs: dict[str, ExportedGraph], own: ExportedGraph
) -> None:
    onnx.checker.check_model(own.path, full_check=True)
    before, after = products(graphs["float16"].path), products(own.path)
    assert [types for _, types in before] == [{TensorProto.FLOAT}] * len(own.sites)
    assert [types for _, types in after] == [{TensorProto.FLOAT16}] * len(own.sites)
    stored = [onnx.load(graph.path).graph.initializer for graph in (graphs["float16"], own)]
    arrays = [{t.name: numpy_helper.to_array(t) for t in tensors} for tensors in stored]
    assert arrays[0].keys() == arrays[1].keys()
    assert all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0]), "the same codes and scales"
    assert own.contract == graphs["float16"].contract


def test_weights_are_dequantized_when_the_graph_is_loaded(own: ExportedGraph, tmp_path: Path) -> None:
    options = session_options(SessionSettings(threads=1, provider=HERE))
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(own.path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    left = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len(left) == len(own.sites), "those of the activations"
    assert not constants.intersection(left), "a DQ of a weight would run at every step"


def test_it_computes_what_was_evaluated(own: ExportedGraph, tiny_model: TorchRunner, plain_ids: Any) -> None:
    used, ids = quantization_of(tiny_model), plain_ids[None, :48]
    with simulated(tiny_model, used.scheme, used.scales):
        expected = tiny_model.logits(ids, used.prefix)
    float_logits = tiny_model.logits(ids, used.prefix)
    session: Any = open_session(own, threads=1, provider=HERE, chunk=16)
    found = session.run(ids[:, :40], need_logits="all")
    steps = [session.run(ids[:, i : i + 1]) for i in range(40, 48)]
    found = np.concatenate([found, *steps], axis=1)
    # Free runs drift apart by rounding; without the quantizers of activations they would be much farther apart.
    assert apart(found, expected) < 0.1 < apart(float_logits, expected)
    assert session.remarks == ("multiplies float16 values of the INT8 codes",)


def apart(found: Any, expected: Any) -> float:
    """Return how far the logits of the median token are apart, as a share of their size (root mean square)."""
    distance, size = ((x**2).mean(axis=-1) ** 0.5 for x in (found - expected, expected))
    return float(np.median(distance / size))


def test_engine_json_claims_no_int8(graphs: dict[str, ExportedGraph], tmp_path: Path) -> None:
    artifact = compile_graph(graphs["float16"], tmp_path, CUDA)
    written = {file.name for file in tmp_path.iterdir()}
    assert written == set(artifact.files) == {"engine.json", "export.json", "model.onnx", "model.onnx.data"}
    assert (artifact.linears, artifact.int8_linears, artifact.ran) == (22, 0, False)
    assert artifact.summary == "cuda; 22 linears multiply float16 values of the INT8 codes"
    assert json.loads((tmp_path / "export.json").read_text())["contract"]["dtype"] == "float16"
    assert artifact.lineage.graph == graphs["float16"].digest


def test_an_engine_that_ran_says_how(
    graphs: dict[str, ExportedGraph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, CUDA.engine, OnnxRuntime(replace(HERE, engine=CUDA.engine)))
    made = CompiledEngine(compile_graph(graphs["float16"], tmp_path, CUDA), tmp_path)
    ran = made.tried(graphs["float16"])
    assert ran.ran
    assert ran.summary == "cuda; multiplies float16 values of the INT8 codes"
    assert coverage(Engine.model_validate(engine_row(ran))) == "multiplies float16 values of the INT8 codes"
    before = Engine.model_validate(engine_row(made.artifact))
    assert coverage(before) == "22 linears multiply float16 values of the INT8 codes"


def test_a_float32_graph_runs_as_it_is(graphs: dict[str, ExportedGraph], tmp_path: Path) -> None:
    artifact = compile_graph(graphs["float32"], tmp_path, CUDA)
    assert [file.name for file in tmp_path.iterdir()] == ["engine.json"]
    assert artifact.summary == "cuda; 22 linears multiply float32 values of the INT8 codes"


def test_a_graph_of_other_parts_is_refused(graphs: dict[str, ExportedGraph], tmp_path: Path) -> None:
    artifact, graph = compile_graph(graphs["float16"], tmp_path, CUDA), graphs["float32"]
    require_same_bundle(artifact, graph)
    other = replace(graph, lineage=replace(graph.lineage, prefix="0" * 64))
    with pytest.raises(CheckFailed, match="compiled from another prefix than this bundle's") as caught:
        require_same_bundle(artifact, other)
    assert "cushion-deploy engine BUNDLE --engine onnxruntime-cuda" in caught.value.hint


def test_a_site_without_a_product_is_an_error(graphs: dict[str, ExportedGraph], tmp_path: Path) -> None:
    graph = replace(graphs["float16"], sites={**graphs["float16"].sites, Site("layers.9.mlp.down"): 1})
    with pytest.raises(CheckFailed, match=r"13 of 14 quantized products .*layers\.9\.mlp\.down"):
        compile_graph(graph, tmp_path, CUDA)
    assert not (tmp_path / "engine.json").exists()
