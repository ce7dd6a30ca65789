"""The ladder as a stage: which rungs there are, what decides a kept result, and the graph behind a bundle's engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cushion_deploy.core.artifacts import (
    PREFIX_FILE,
    SCALES_FILE,
    SMOOTHING_FILE,
    write_prefix,
    write_scales,
    write_smoothing,
)
from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.errors import CheckFailed
from cushion_deploy.parity.checks import ParityReport
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.base import Given
from cushion_deploy.stages.compile import EngineToRun
from cushion_deploy.stages.parity import distinct_graphs
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.run import Run
from cushion_deploy.store import StageStore
from cushion_deploy.verbs.parity import check_bundle, climb

RUNGS = [
    "scales in the graph against scales.json",
    "weights in the graph against fake-quant",
    "float graph against transformers",
    "float graph: decode against prefill",
    "canonical ONNX against fake-quant",
    "onnxruntime kernels against fake-quant",
    "onnxruntime kernels: decode against prefill",
    "onnxruntime engine against fake-quant",
]
HALF_RUNGS = [
    "scales in the float16 graph against scales.json",
    "weights in the float16 graph against fake-quant",
    "float16 graph against the float32 graph",
]


@dataclass(frozen=True)
class Built:
    """What the stages before the ladder made, and how to run them again in the same work folder."""

    pipeline: Pipeline
    run: Callable[[], Run]
    quantization: Quantization
    graph: ExportedGraph
    half: ExportedGraph


@pytest.fixture(scope="module")
def built(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Return the tiny model with scales and both graphs, without a prefix."""
    folder = tmp_path_factory.mktemp("parity")
    (folder / "calib.txt").write_text("The quick brown fox jumps over the lazy dog; the dog sleeps. " * 12)
    (folder / "eval.txt").write_text("When nothing else is worth attending to, a head attends to the first. " * 6)
    recipe = Recipe().merged(
        {
            "model": str(tiny_folder),
            "search.enabled": False,
            "calibration.data": str(folder / "calib.txt"),
            "calibration.windows": 4,
            "calibration.window": 64,
            "evaluation.data": str(folder / "eval.txt"),
            "evaluation.window": 64,
            "evaluation.max_tokens": 64,
            "parity.tokens": 32,
            "parity.decode_tokens": 2,
        }
    )

    def run() -> Run:
        return Run(StageStore(folder / "work"))

    pipeline, first = Pipeline.of(recipe), run()
    quantization = pipeline.quantized.quantization
    # As plans are compiled from: TensorRT gathers no codes of an embedding.
    forms = pipeline.form, dataclasses.replace(pipeline.form, dtype="float16", gathers_codes=False)
    graph, half = (first.get(pipeline.graph(quantization, form)) for form in forms)
    return Built(pipeline, run, first.get(quantization), graph, half)


def rungs(report: ParityReport) -> list[str]:
    return list(dict.fromkeys(check.rung for check in report.checks))


def checked(built: Built, half: ExportedGraph | None, *, reuse: bool = True) -> ParityReport:
    plans = (Given(half),) if half else ()
    stage = built.pipeline.parity(Given(built.quantization), Given(built.graph), plans)
    return climb(built.run(), stage, reuse=reuse)


def test_an_engine_compiles_the_graph_of_its_type(built: Built) -> None:
    def chosen(name: str, **settings: object) -> ExportedGraph:
        pipeline = built.pipeline.altered({"tensorrt.max_context": 64, **settings})
        return built.run().get(pipeline.engine_graph(Given(built.quantization), Given(built.graph), name))

    assert (chosen("onnxruntime"), chosen("tensorrt-rtx")) == (built.graph, built.half)
    assert distinct_graphs([built.graph, built.half, built.half], built.graph) == (built.half,)
    # TensorRT reads no codes, but this embedding is stored in floating point anyway: nothing would differ.
    assert chosen("tensorrt-rtx", **{"tensorrt.dtype": "float32"}) is built.graph


def test_the_float16_graph_has_rungs_of_its_own_and_is_part_of_the_key(built: Built) -> None:
    without, both = checked(built, None), checked(built, built.half)
    assert (rungs(without), without.passed) == (RUNGS, True)
    assert (sorted(rungs(both)), both.passed) == (sorted(RUNGS + HALF_RUNGS), True)
    assert rungs(both)[0] == RUNGS[0]


def test_a_fault_of_the_float16_graph_alone_fails_its_rungs_alone(built: Built, tmp_path: Path) -> None:
    model = onnx.load(built.half.path)
    for tensor in model.graph.initializer:
        if tensor.name == "layers.1.attn.out.scale":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), tensor.name))
    path = tmp_path / "float16.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="float16.onnx.data", size_threshold=256)
    report = checked(built, dataclasses.replace(built.half, path=path), reuse=False)
    named = {check.rung: check.site for check in report.checks if not check.passed}
    # The last check of a rung counts here, that of the logits: the float head reads what every layer left.
    assert named == {HALF_RUNGS[0]: "layers.1.attn.out", HALF_RUNGS[2]: "layers.1.mlp.gate_up"}


@pytest.mark.parametrize(("compiled_from", "expected"), [("half", RUNGS + HALF_RUNGS), ("another", RUNGS)])
def test_a_bundle_is_checked_with_the_graph_that_its_engine_was_compiled_from(
    compiled_from: str, expected: list[str], built: Built, tmp_path: Path
) -> None:
    assert built.quantization.smoothing is not None
    write_scales(built.quantization.static_scales, tmp_path / SCALES_FILE)
    write_prefix(built.quantization.prefix, tmp_path / PREFIX_FILE)
    write_smoothing(built.quantization.smoothing, tmp_path / SMOOTHING_FILE)
    digest = built.half.digest if compiled_from == "half" else "0" * 64
    parents = Lineage(graph=digest), {}
    artifact = EngineArtifact(
        "tensorrt-rtx", ("sm86",), "key", ("engine.json",), 22, 22, 0, False, {"dtype": "float16"}, *parents
    )
    engine = tmp_path / "engines" / "tensorrt-rtx" / "engine.json"
    engine.parent.mkdir(parents=True)
    engine.write_text(json.dumps(artifact.to_json()))
    report = check_bundle(built.pipeline.recipe, built.run(), tmp_path, built.graph, reuse=True)
    assert sorted(rungs(report)) == sorted(expected)
    # What could not be looked at is told.
    assert len(report.unchecked) == (compiled_from == "another")
    assert all("plan of tensorrt-rtx is not checked" in sentence for sentence in report.unchecked)


def engine(name: str, graph: ExportedGraph) -> Given[Any]:
    """Return an engine for the ladder that runs a graph in ONNX Runtime under another name."""
    return Given(EngineToRun(name, graph.digest + name, lambda: open_session(graph, threads=1)))


def test_another_engine_has_a_rung_and_a_score_and_fails_if_it_computes_something_else(
    built: Built, tmp_path: Path
) -> None:
    model = onnx.load(built.graph.path)
    for tensor in model.graph.initializer:
        if tensor.name == "layers.1.mlp.down.scale":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / np.float32(8), tensor.name))
    path = tmp_path / "other.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="other.onnx.data", size_threshold=256)
    other = dataclasses.replace(built.graph, path=path)

    def gone() -> Any:
        raise CheckFailed("the device is gone", hint="look for it")

    missing = Given(EngineToRun("gone", "gone", gone))
    engines = engine("right", built.graph), engine("wrong", other), missing
    stage = built.pipeline.parity(Given(built.quantization), Given(built.graph), (), engines)
    run = built.run()
    found = run.get(stage)
    passed = {check.rung: check.passed for check in found.report.checks}
    assert passed["onnxruntime engine against fake-quant"]
    assert passed["right engine against fake-quant"]
    assert not passed["wrong engine against fake-quant"]
    assert found.report.unchecked == ("gone was not run: the device is gone",)
    assert set(found.engines) == {"right", "wrong"}
    assert found.engines["right"].perplexity == found.engine_perplexity
    # Engines are part of the key, and what was found is read back.
    assert run.key(stage) != run.key(dataclasses.replace(stage, engines=engines[:2]))
    assert built.run().get(stage) == found
