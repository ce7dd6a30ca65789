"""The graph of the TensorRT providers: TensorRT reads no codes of an embedding, so it stores none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.onnxruntime.load import load_graph
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.engines.onnxruntime.settings import CPU, TENSORRT, TENSORRT_RTX, SessionSettings
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import CheckFailed, UsageError
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.report.document.build import Engine
from cushion_deploy.report.statements import coverage
from cushion_deploy.runtime.bundle import read_graph
from cushion_deploy.stages.compile import CompiledEngine
from cushion_deploy.stages.engine_graph import engine_form
from cushion_deploy.stages.report import engine_row

NAMES = TENSORRT.engine, TENSORRT_RTX.engine


@pytest.fixture(scope="module")
def graphs(tiny_model: TorchRunner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportedGraph]:
    """Return the bundle's graph of a model with an INT8 embedding, and the one that the engines compile."""
    prefix = tiny_model.compute_prefix((7, 1))
    parents = Lineage(tiny_model.spec.weights_digest, prefix.digest, text="none")
    scales = ActivationScales(dict.fromkeys(tiny_model.sites, 0.05), "max", parents, tokens=1)
    quantization = Quantization(prefix, QuantScheme(quantize_head=False, int8_embedding=True), scales)
    found = {}
    for name, form in (("bundle", GraphForm()), ("own", engine_form(GraphForm(), ENGINES[NAMES[0]], "auto", 64)[0])):
        folder = tmp_path_factory.mktemp(name)
        found[name] = export_graph(tiny_model.spec, tiny_model.weights, quantization, form, folder)
    return found


def refused(path: Path) -> list[str]:
    """Return the names of INT8 constants that TensorRT refuses: before anything but a DQ, or with scales by block."""
    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.INT8}
    found = []
    for node in graph.node:
        scaled = node.op_type == "DequantizeLinear" and not any(a.name == "block_size" for a in node.attribute)
        zero_point = node.op_type == "QuantizeLinear"
        found += [name for name in node.input if name in constants and not scaled and not zero_point]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_that_is_handed_over_stores_no_codes(
    name: str, graphs: dict[str, ExportedGraph], tmp_path: Path
) -> None:
    assert refused(graphs["bundle"].path), "the bundle's graph gathers codes, and its head scales them by block"
    artifact = ENGINES[name].compile(graphs["own"], tmp_path, CompileOptions())
    files = {"engine.json", "export.json", "model.onnx", "model.onnx.data"}
    assert {file.name for file in tmp_path.iterdir()} == set(artifact.files) == files
    own = read_graph(tmp_path)
    assert refused(own.path) == []
    assert (own.contract.dtype, own.int8_embedding) == ("float32", False)
    onnx.checker.check_model(own.path, full_check=True)


def test_tensorrt_builds_nothing_from_the_bundles_graph(graphs: dict[str, ExportedGraph], tmp_path: Path) -> None:
    """TensorRT-RTX is the one that builds without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    options = CompileOptions(("sm86",), max_context=64, max_prefill=16)
    with pytest.raises(CheckFailed, match=r"Quantized constant \(.*_codes\) is only allowed before DQ"):
        ENGINES["tensorrt-rtx"].compile(graphs["bundle"], tmp_path, options)


def test_it_computes_the_logits_of_the_bundles_graph(graphs: dict[str, ExportedGraph], plain_ids: Any) -> None:
    sessions = (open_session(graphs[name], threads=1) for name in ("own", "bundle"))
    found, expected = (session.run(plain_ids[None, :24], need_logits="all") for session in sessions)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_codes_are_refused_before_anything_is_loaded_or_written(
    graphs: dict[str, ExportedGraph], tmp_path: Path
) -> None:
    engine = ENGINES[NAMES[0]]
    with pytest.raises(
        UsageError, match="stores the embedding as INT8 codes, which TensorrtExecutionProvider"
    ) as caught:
        engine.open(graphs["bundle"])
    assert f"cushion-deploy engine BUNDLE --engine {NAMES[0]}" in caught.value.hint
    with pytest.raises(CheckFailed, match="INT8 codes"):
        engine.compile(graphs["bundle"], tmp_path, CompileOptions())
    assert list(tmp_path.iterdir()) == []


def test_no_int8_is_claimed(graphs: dict[str, ExportedGraph], tmp_path: Path) -> None:
    artifact = ENGINES[NAMES[0]].compile(graphs["own"], tmp_path, CompileOptions())
    said = f"INT8 is not counted in {graphs['own'].linears} linears"
    assert artifact.summary == f"cuda; {said}"
    assert coverage(Engine.model_validate(engine_row(artifact))) == said


def test_a_graph_that_is_the_bundles_is_not_stored_twice(graphs: dict[str, ExportedGraph], tmp_path: Path) -> None:
    """As for a model whose embedding is stored in floating point: TensorRT then reads model.onnx."""
    bundle, made = tmp_path / "bundle", tmp_path / "made"
    bundle.mkdir()
    made.mkdir()
    graph = graphs["own"]
    (bundle / "export.json").write_text(json.dumps(graph.to_json()))
    (bundle / "model.onnx").write_bytes(graph.path.read_bytes())
    CompiledEngine(ENGINES[NAMES[0]].compile(graph, made, CompileOptions()), made).place(bundle)
    placed = bundle / "engines" / NAMES[0]
    assert [file.name for file in placed.iterdir()] == ["engine.json"]
    assert json.loads((placed / "engine.json").read_text())["files"] == ["engine.json"]


def test_tensorrt_is_told_that_a_graph_has_int8(monkeypatch: pytest.MonkeyPatch, graphs: Any) -> None:
    """TensorRT before 11 refuses Q and DQ unless its provider is told (microsoft/onnxruntime, issue 13381)."""
    asked: list[Any] = []

    opened = onnxruntime.InferenceSession

    class Loaded:
        def __init__(self, path: Path, options: Any, providers: list[Any]) -> None:
            asked.append(providers)
            self._here = opened(path, options, providers=["CPUExecutionProvider"])

        def __getattr__(self, name: str) -> Any:
            return getattr(self._here, name)

        def get_providers(self) -> list[str]:
            return TENSORRT.chain

        def get_provider_graph_assignment_info(self) -> list[Any]:
            return []

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: TENSORRT.chain)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Loaded)
    monkeypatch.setattr("cushion_deploy.engines.onnxruntime.settings.exact_kernels", lambda: {})
    load_graph(graphs["own"].path, SessionSettings(provider=TENSORRT))
    assert asked == [[("TensorrtExecutionProvider", {"trt_int8_enable": "1"}), "CPUExecutionProvider"]]
    assert CPU.configured == ["CPUExecutionProvider"]
