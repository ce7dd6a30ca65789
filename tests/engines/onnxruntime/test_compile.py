"""ONNX Runtime on the CPU: what the optimized graph runs in INT8 is counted, and anything less fails."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from broken_graphs import (
    VICTIM,
    codes_as_output,
    float_linear,
    float_weight,
    second_consumer_of_dq,
    second_consumer_of_q,
)
from onnx import numpy_helper

from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.onnxruntime import coverage as coverage_file
from cushion_deploy.engines.onnxruntime.coverage import read_coverage
from cushion_deploy.engines.onnxruntime.engine import OnnxRuntime
from cushion_deploy.engines.onnxruntime.kernels import SESSION_CONFIG
from cushion_deploy.engines.onnxruntime.settings import session_config
from cushion_deploy.errors import CheckFailed, ExitCode, MissingDependency

STRICT = CompileOptions()
LAYERS = 3
LINEARS = 7 * LAYERS + 1

SABOTAGE = [second_consumer_of_dq, second_consumer_of_q, codes_as_output, float_weight, float_linear]


@pytest.mark.parametrize(("name", "linears"), [("int8", LINEARS), ("float head", LINEARS - 1)])
def test_every_linear_of_the_graph_runs_in_int8(
    name: str, linears: int, tiny_graphs: dict[str, ExportedGraph], tmp_path: Path
) -> None:
    graph = tiny_graphs[name]
    coverage = read_coverage(graph)
    assert coverage.int8 == set(graph.sites)
    assert coverage.left == []
    assert coverage.changed == []
    assert coverage.kernels["MatMulIntegerToFloat"] == len(graph.sites)
    assert coverage.kernels["DequantizeLinear"] == 0
    assert coverage.kernels["QuantizeLinear"] == len(graph.sites)
    assert coverage.rewritten in (0, len(graph.sites)), "all or none: it depends only on the processor"
    artifact = OnnxRuntime().compile(graph, tmp_path, STRICT)
    assert (artifact.linears, artifact.int8_linears) == (linears, linears)


def test_the_graph_on_disk_stays_as_it_is(tiny_graphs: dict[str, ExportedGraph], tmp_path: Path) -> None:
    graph = tiny_graphs["int8"]
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in graph.path.parent.iterdir()}
    OnnxRuntime().compile(graph, tmp_path, STRICT)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in graph.path.parent.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["engine.json"]


@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_a_linear_that_left_int8_is_found_and_fails_unless_allowed(
    sabotage: Callable[[onnx.ModelProto], None], tiny_graphs, edited, tmp_path: Path
) -> None:
    graph = edited(tiny_graphs["int8"], sabotage)
    coverage = read_coverage(graph)
    assert coverage.int8 == set(graph.sites) - {VICTIM}
    assert f"{VICTIM}: not in the integer kernel" in coverage.left
    out = tmp_path / "engine"
    out.mkdir()
    for allowed in (0, 1):
        with pytest.raises(CheckFailed, match=f"runs {LINEARS - 2} of {LINEARS} linears in INT8") as caught:
            OnnxRuntime().compile(graph, out, CompileOptions(allow_float_linears=allowed))
        assert caught.value.exit_code == ExitCode.CHECK_FAILED
        assert "--allow-float-linears" in caught.value.hint
        assert "layers.1.mlp" in caught.value.message
        assert not list(out.iterdir())
    artifact = OnnxRuntime().compile(graph, out, CompileOptions(allow_float_linears=2))
    assert (artifact.linears, artifact.int8_linears) == (LINEARS, LINEARS - 2)
    assert artifact.details["left_in_float"] == coverage.left


def test_a_graph_that_lost_every_quantizer_fails_and_names_sites(tiny_graphs, tmp_path: Path) -> None:
    graph = dataclasses.replace(tiny_graphs["float"], quantized=True)
    with pytest.raises(CheckFailed, match=f"runs 0 of {LINEARS} linears in INT8; left: head: not in"):
        OnnxRuntime().compile(graph, tmp_path, STRICT)


def test_integer_kernels_on_int8_activations_do_not_count(tiny_graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this option ONNX Runtime fuses everything, into portable code at a fifth of the speed of FP32."""
    monkeypatch.setitem(SESSION_CONFIG, "session.qdqisint8allowed", "1")
    monkeypatch.setitem(SESSION_CONFIG, "session.x64quantprecision", "0")
    coverage = read_coverage(tiny_graphs["int8"])
    assert coverage.kernels["MatMulIntegerToFloat"] == len(tiny_graphs["int8"].sites)
    assert coverage.int8 == set()
    assert sum("activation is not uint8" in line for line in coverage.left) == len(tiny_graphs["int8"].sites)


def test_a_float_graph_has_nothing_to_prove(tiny_graphs, tmp_path: Path) -> None:
    graph = tiny_graphs["float"]
    artifact = OnnxRuntime().compile(graph, tmp_path, STRICT)
    assert (artifact.linears, artifact.int8_linears) == (LINEARS, 0)
    assert artifact.details["left_in_float"] == []
    assert artifact.details["integer_matmuls"] == 0


def uint8_weights(model: onnx.ModelProto, site: str, bump: int) -> None:
    """Store a weight as ONNX Runtime does without VNNI: uint8, zero point 128; one code is off by ``bump``."""
    tensor = next(t for t in model.graph.initializer if t.name.startswith(f"{site}.weight_codes"))
    codes = numpy_helper.to_array(tensor).astype(np.int16)
    if codes.min() < 0:
        codes += 128
    codes[3, 2] += bump
    old, new = tensor.name, f"{site}.weight_codes_s8_2_u8"
    tensor.CopyFrom(numpy_helper.from_array(codes.astype(np.uint8), new))
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


@pytest.mark.parametrize("bump", [0, 1, -1])
def test_a_rewrite_that_changes_one_code_fails(
    bump: int, tiny_graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ort.InferenceSession

    def rewriting(path: str, options: Any, **more: Any) -> Any:
        session = real(path, options, **more)
        optimized = Path(options.optimized_model_filepath)
        model = onnx.load(optimized)
        uint8_weights(model, VICTIM, bump)
        onnx.save_model(model, optimized)
        return session

    monkeypatch.setattr(ort, "InferenceSession", rewriting)
    if bump == 0:
        artifact = OnnxRuntime().compile(tiny_graphs["int8"], tmp_path, STRICT)
        assert artifact.details["weights_stored_as_uint8"] >= 1
        assert artifact.details["codes_changed"] == 0
        return
    with pytest.raises(CheckFailed, match=f"changed weight codes of {VICTIM}"):
        OnnxRuntime().compile(tiny_graphs["int8"], tmp_path, CompileOptions(allow_float_linears=99))
    assert not list(tmp_path.iterdir())


def test_engine_json_is_the_artifact(tiny_graphs, tmp_path: Path) -> None:
    graph = tiny_graphs["int8"]
    artifact = OnnxRuntime().compile(graph, tmp_path, STRICT)
    again = EngineArtifact.from_json(json.loads((tmp_path / "engine.json").read_text()))
    assert again == artifact
    assert again.engine == "onnxruntime"
    assert again.targets == ("cpu",)
    assert again.files == ("engine.json",)
    assert not again.ran
    assert again.details["not_run"] == "not run: compilation executes nothing"
    assert (again.lineage, again.versions) == (Lineage(graph=graph.digest), {"onnxruntime": ort.__version__})
    assert again.details["machine"] == platform.machine()
    assert again.details["session_config"] == session_config()
    assert again.details["kernels"]["MatMulIntegerToFloat"] == again.details["integer_matmuls"] == len(graph.sites)


def test_the_key_is_of_graph_version_and_configuration(
    tiny_graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tiny_graphs["int8"]

    def key(graph: ExportedGraph = graph, options: CompileOptions = STRICT) -> str:
        return OnnxRuntime().compile(graph, tmp_path, options).key

    first = key()
    assert first == key() == key(options=CompileOptions(max_batch=7)), "limits mean nothing to this engine"
    others = [key(dataclasses.replace(graph, digest="0" * 64))]
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda name: "9.9.9")
        others.append(key())
    with monkeypatch.context() as patch:
        patch.setitem(SESSION_CONFIG, "session.intra_op.allow_spinning", "0")
        others.append(key())
    assert len({first, *others}) == 4
    assert key() == first


def no_such_distribution(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def test_without_the_library_the_hint_is_the_install_command(
    tiny_graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", no_such_distribution)
    with pytest.raises(MissingDependency, match="engine 'onnxruntime' needs onnxruntime, which is not installed"):
        OnnxRuntime().require()
    with pytest.raises(MissingDependency) as caught:
        OnnxRuntime().compile(tiny_graphs["int8"], tmp_path, STRICT)
    assert caught.value.exit_code == ExitCode.MISSING
    assert caught.value.hint == "pip install 'cushion-deploy[cpu]'"


def test_the_gpu_build_of_the_library_serves_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        return "1.2.3" if name == "onnxruntime-gpu" else no_such_distribution(name)

    monkeypatch.setattr(metadata, "version", version)
    OnnxRuntime().require()
    assert OnnxRuntime().version() == "1.2.3"


def test_space_for_the_optimized_graph_is_asked_for_first(tiny_graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(coverage_file, "require_space", lambda folder, needed: asked.append(needed))
    read_coverage(tiny_graphs["int8"])
    assert asked == [
        2 * sum(tiny_graphs["int8"].path.with_name(n).stat().st_size for n in ("int8.onnx", "int8.onnx.data"))
    ]
